"""Conversations about images, written by a language model from captions and boxes."""
