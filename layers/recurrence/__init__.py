"""Holds the recurrences of layers with a state: over a chain of tokens in chunks, over a draft tree in one block."""
