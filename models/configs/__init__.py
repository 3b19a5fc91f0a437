"""Reads `config.json` files of Hugging Face models into a `ModelConfig`."""
