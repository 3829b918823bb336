"""Checkpoints: formats of others and our own, read and written."""
