"""What a block is made of: shared primitives, and one folder per contract (attention, mixers, caches)."""
