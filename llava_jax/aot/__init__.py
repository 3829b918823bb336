"""Programs compiled ahead of time: TPU topologies, and what a compiled program needs."""
