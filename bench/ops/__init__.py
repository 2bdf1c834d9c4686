"""The benchmark of single operators, `python bench/run.py --ops`: a file each, with what it is held against."""
