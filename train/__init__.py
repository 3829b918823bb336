"""Training of LLaVA."""
