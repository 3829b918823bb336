"""Captions as conversations for stage 1."""
