"""Draws the weights of a tensor from its name, so that two programs have the same without a file between them."""

import json
import zlib
from collections.abc import Mapping

import numpy as np

TOKENS = [(7 * index + 3) % 61 for index in range(24)]  # the prompt whose logits are compared
PROBED = [5, 23]  # positions of these logits


def checksum(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """One number of the names and shapes of tensors."""
    return zlib.crc32(json.dumps(sorted((name, list(shape)) for name, shape in shapes.items())).encode())


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 numbers: matrices keep the size of their inputs, norms are about one, the rest is small."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) >= 2:
        sharper = 1.5 if "q_proj" in name or "k_proj" in name or "qkv" in name.lower() or "c_attn" in name else 1.0
        scale = 0.5 if "embed" in name or name.endswith(("wte.weight", "wpe.weight")) else sharper * shape[-1] ** -0.5
        return (noise * scale).astype(np.float32)
    around = 1.0 if "norm" in name or "ln_" in name else 0.0
    return (around + 0.3 * noise).astype(np.float32)
