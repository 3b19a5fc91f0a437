"""Pallas kernels for TPU and GPU, one folder each; the library runs without them, on XLA."""
