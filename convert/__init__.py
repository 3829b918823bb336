"""Conversion of checkpoints: `python -m convert --help`."""
