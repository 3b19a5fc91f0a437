"""Holds the code that the decode kernels share: flash_decode, paged_decode and gather_decode."""
