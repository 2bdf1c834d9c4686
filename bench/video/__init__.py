"""The level `video`: files to pixels, and files to captions."""
