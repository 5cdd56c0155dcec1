"""Measurements on a GPU, one line a case: `python -m benchmarks --help`."""
