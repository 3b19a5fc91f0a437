"""Attention: masks as an algebra, and the one function that applies them."""
