"""Models as pure functions, the families they come in, and how checkpoints become parameters."""
