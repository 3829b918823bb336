"""The model on the device: pure functions of a tree of parameters."""
