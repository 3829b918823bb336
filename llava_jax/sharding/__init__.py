"""Where arrays are: the mesh, and how parameters and activations are sharded over it."""
