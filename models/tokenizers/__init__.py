"""Converts text to token ids and back, and reads the ids that end a text."""
