"""Small changes to a model's weights that are trained and kept apart from it."""
