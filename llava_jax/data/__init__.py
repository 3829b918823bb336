"""Host-side data: converts images and text to arrays, and splices them."""
