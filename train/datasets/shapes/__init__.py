"""A synthetic dataset: images of coloured shapes, captions and conversations about them."""
