"""The mathematics of layers with a recurrent state: over a chain of tokens chunk by chunk, over a tree all at once."""
