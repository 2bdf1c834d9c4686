"""The level `video`."""
