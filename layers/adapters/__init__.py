"""Holds adapters: small changes to a model's weights that are trained and stored separately."""
