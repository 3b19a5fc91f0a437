"""Attention: masks, and the functions that apply them to a cache and new tokens."""
