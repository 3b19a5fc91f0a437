"""Holds models as pure functions, the model families, and the reading of checkpoints into parameters."""

if __name__ != "decodax.models":
    raise ImportError("models is a part of decodax: import decodax.models")
