"""Ahead-of-time compilation: TPU topologies, and the memory, FLOPs and bytes sent of compiled programs."""
