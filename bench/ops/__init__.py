"""The level `ops`."""
