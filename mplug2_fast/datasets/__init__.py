"""Annotated data: one JSON line per item, and converters from the official annotation files."""

from mplug2_fast.datasets.items import Item, read_items, write_items

__all__ = ["Item", "read_items", "write_items"]
