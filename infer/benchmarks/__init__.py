"""The benchmarks that LLaVA's papers report: a module for each, scored as the reference scores it."""
