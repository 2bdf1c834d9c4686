"""Operators as cases of the benchmark: a file each, with what bounds it."""
