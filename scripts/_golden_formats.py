"""Packs random codes as published layouts say, bit by bit, and computes their numbers: GPTQ and AWQ.

Neither library runs without a GPU here, so this is written from the layouts that AutoGPTQ and AutoAWQ document, and
shares nothing with the reader.
"""

from typing import Any

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each four bits of a word belong to, the lowest first

Arrays = dict[str, Any]


def packed_words(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Words of 32 bits, int32, each with consecutive codes along an axis, or with them in this order."""
    count = 32 // bits
    lines = np.moveaxis(codes, axis, -1)
    words = np.zeros((*lines.shape[:-1], lines.shape[-1] // count), np.uint32)
    for index in np.ndindex(words.shape):
        *line, word = index
        for place, offset in enumerate(order or range(count)):
            words[index] |= np.uint32(int(lines[(*line, word * count + offset)]) << (bits * place))
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def gptq(
    rng: np.random.Generator, shape: tuple[int, int], bits: int, group_size: int, *, sym: bool, shuffled: bool, v2: bool
) -> tuple[Arrays, np.ndarray]:
    """The pieces of a weight [outputs, inputs], and its numbers."""
    outputs, inputs = shape
    size = inputs if group_size == -1 else group_size
    groups, largest = inputs // size, 2**bits - 1
    codes = rng.integers(0, largest + 1, (inputs, outputs))
    first = 0 if v2 else 1  # version 1 keeps zero points less 1, so 0 has no stored form and largest + 1 has one
    zeros = rng.integers(first, first + largest + 1, (groups, outputs))
    zeros.flat[:2] = first, first + largest
    if sym:
        zeros[...] = 2 ** (bits - 1)
    scales = rng.uniform(0.002, 0.02, (groups, outputs)).astype(np.float16)
    group_of = np.arange(inputs) // size
    if shuffled:
        group_of = rng.permutation(group_of)
    numbers = np.empty(shape, np.float32)
    for out, i in np.ndindex(shape):
        group = group_of[i]
        numbers[out, i] = np.float64(codes[i, out] - zeros[group, out]) * np.float64(scales[group, out])
    return {
        "qweight": packed_words(codes, bits, 0),
        "qzeros": packed_words(zeros - first, bits, 1),
        "scales": scales,
        "g_idx": group_of.astype(np.int32),
    }, numbers


def awq(rng: np.random.Generator, shape: tuple[int, int], group_size: int) -> tuple[Arrays, np.ndarray]:
    """The pieces of a weight [outputs, inputs], and its numbers."""
    outputs, inputs = shape
    groups = inputs // group_size
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (groups, outputs))
    scales = rng.uniform(0.002, 0.02, (groups, outputs)).astype(np.float16)
    numbers = np.empty(shape, np.float32)
    for out, i in np.ndindex(shape):
        group = i // group_size
        numbers[out, i] = np.float64(codes[i, out] - zeros[group, out]) * np.float64(scales[group, out])
    return {
        "qweight": packed_words(codes, 4, 1, AWQ_ORDER),
        "qzeros": packed_words(zeros, 4, 1, AWQ_ORDER),
        "scales": scales,
    }, numbers
