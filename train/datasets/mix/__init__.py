"""Several data files as one, and a report of what is in them."""
