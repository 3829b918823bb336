"""Data files and their images as a prepared dataset (`train.prepared`)."""
