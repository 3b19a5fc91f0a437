"""Reads LoRA adapters in the form of the PEFT library, and merges them into the stored tensors of a model."""
