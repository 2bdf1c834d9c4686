"""The level `modules`."""
