"""Modules of the model, each in the forms that are compared: cases for `bench.runner`."""
