"""Reads and writes the weights of models: safetensors and Orbax, and the conversion between them."""
