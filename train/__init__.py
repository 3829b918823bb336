"""Train LLaVA."""
