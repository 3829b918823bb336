"""Where training data comes from: each module writes a data file and its images."""
