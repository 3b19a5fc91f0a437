"""Decodes GGUF's types of numbers: plain floats, and blocks of small integers that share scales.

Format: https://github.com/ggml-org/llama.cpp, whose ggml-common.h has the blocks. A quantised row is a sequence of
blocks of 32 or 256 numbers. In every type a number is code x scale, or code x scale + offset, in float32: a type is an
`unpack` that gives codes, scales and offsets, and one decoder multiplies them. In the "K" types scales and offsets are
products of a block's float16 number and a group's four to eight bits, rounded to float32, as llama.cpp rounds them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}

_FP4_CODES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # twice their values
_IQ4_CODES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_FP4_SCALES = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


@dataclass(frozen=True)
class Parts:
    """The codes and scales of some blocks, as they are: number = code x scale (+ offset, where there is one).

    codes: int8 or uint8 [blocks, numbers], one for each number, in the order of the row.
    scales: float32 [blocks, groups]; group g has the numbers from g x (numbers / groups) on.
    offsets: float32 [blocks, groups], or None.
    """

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None


@dataclass(frozen=True)
class BlockType:
    """A quantised type.

    numbers: in a block.
    num_bytes: of a block.
    unpack: uint8 [blocks, num_bytes] -> the parts of the blocks.
    """

    numbers: int
    num_bytes: int
    unpack: Callable[[np.ndarray], Parts]

    def parts(self, blocks: np.ndarray) -> Parts:
        """The parts of blocks."""
        with np.errstate(all="ignore"):
            return self.unpack(blocks)

    def decode(self, blocks: np.ndarray) -> np.ndarray:
        """The numbers of blocks, float32 [blocks, numbers]."""
        if not len(blocks):
            return np.empty((0, self.numbers), np.float32)
        parts = self.parts(blocks)
        with np.errstate(all="ignore"):  # the reader reports NaN and infinity
            values = parts.codes.astype(np.float32).reshape(*parts.scales.shape, -1)
            values *= parts.scales[..., None]
            if parts.offsets is not None:
                values += parts.offsets[..., None]
        return values.reshape(len(blocks), self.numbers)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 number at a byte of each block, as float32 [blocks, 1]."""
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray, width: int) -> np.ndarray:
    """Of each `width` bytes the low halves, then the high halves: uint8 [blocks, 2 x bytes]."""
    chunks = packed.reshape(len(packed), -1, width)
    codes = np.empty((len(packed), chunks.shape[1], 2, width), np.uint8)
    np.bitwise_and(chunks, 15, out=codes[:, :, 0])
    np.right_shift(chunks, 4, out=codes[:, :, 1])
    return codes.reshape(len(packed), -1)


def _bit_pairs(packed: np.ndarray, width: int) -> np.ndarray:
    """Of each `width` bytes the lowest two bits, then the next two, and so on: uint8 [blocks, 4 x bytes]."""
    chunks = packed.reshape(len(packed), -1, 1, width)
    return (chunks >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(len(packed), -1)


def _bits(packed: np.ndarray) -> np.ndarray:
    """The bits of bytes, the lowest first: uint8 [blocks, 8 x bytes]."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _bit_planes(packed: np.ndarray) -> np.ndarray:
    """The lowest bits of all bytes, then the next ones, and so on: uint8 [blocks, 8 x bytes]."""
    return (packed[:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(packed), -1)


def _signed(codes: np.ndarray, zero: int) -> np.ndarray:
    """Codes less their zero, int8."""
    return np.subtract(codes.view(np.int8), np.int8(zero))


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight scales and eight minimums of six bits in 12 bytes, float32 [blocks, 8] each."""
    scale, low, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([scale & 63, both & 15 | scale >> 2 & 48], axis=1)
    minimums = np.concatenate([low & 63, both >> 4 | low >> 2 & 48], axis=1)
    return scales.astype(np.float32), minimums.astype(np.float32)


def _q4_0(blocks: np.ndarray) -> Parts:
    return Parts(_signed(_nibbles(blocks[:, 2:], 16), 8), _half(blocks, 0))


def _q4_1(blocks: np.ndarray) -> Parts:
    return Parts(_nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: np.ndarray) -> Parts:
    codes = _nibbles(blocks[:, 6:], 16) | _bits(blocks[:, 2:6]) << 4
    return Parts(_signed(codes, 16), _half(blocks, 0))


def _q5_1(blocks: np.ndarray) -> Parts:
    codes = _nibbles(blocks[:, 8:], 16) | _bits(blocks[:, 4:8]) << 4
    return Parts(codes, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: np.ndarray) -> Parts:
    return Parts(blocks[:, 2:].view(np.int8), _half(blocks, 0))


def _q2_k(blocks: np.ndarray) -> Parts:
    both = blocks[:, :16]
    scales, minimums = (both & 15).astype(np.float32), (both >> 4).astype(np.float32)
    return Parts(_bit_pairs(blocks[:, 16:80], 32), _half(blocks, 80) * scales, -(_half(blocks, 82) * minimums))


def _q3_k(blocks: np.ndarray) -> Parts:
    high, packed = _bit_planes(blocks[:, :32]), blocks[:, 96:108]
    codes = _signed(_bit_pairs(blocks[:, 32:96], 32) | high << 2, 4)
    scales = _nibbles(packed[:, :8], 8) | _bit_pairs(packed[:, 8:], 4) << 4
    return Parts(codes, _half(blocks, 108) * _signed(scales, 32).astype(np.float32))


def _q4_k(blocks: np.ndarray) -> Parts:
    scales, minimums = _six_bit_pairs(blocks[:, 4:16])
    return Parts(_nibbles(blocks[:, 16:], 32), _half(blocks, 0) * scales, -(_half(blocks, 2) * minimums))


def _q5_k(blocks: np.ndarray) -> Parts:
    scales, minimums = _six_bit_pairs(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:], 32) | _bit_planes(blocks[:, 16:48]) << 4
    return Parts(codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * minimums))


def _q6_k(blocks: np.ndarray) -> Parts:
    codes = _nibbles(blocks[:, :128], 64) | _bit_pairs(blocks[:, 128:192], 32) << 4
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return Parts(_signed(codes, 32), _half(blocks, 208) * scales)


def _iq4_nl(blocks: np.ndarray) -> Parts:
    return Parts(_IQ4_CODES[_nibbles(blocks[:, 2:], 16)], _half(blocks, 0))


def _iq4_xs(blocks: np.ndarray) -> Parts:
    low, high = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8) & 15, _bits(blocks[:, 2:4])
    scales = low.reshape(-1, 8) | high[:, 0::2] << 4 | high[:, 1::2] << 5
    codes = _IQ4_CODES[_nibbles(blocks[:, 8:], 16)]
    return Parts(codes, _half(blocks, 0) * _signed(scales, 32).astype(np.float32))


def _mxfp4(blocks: np.ndarray) -> Parts:
    return Parts(_FP4_CODES[_nibbles(blocks[:, 1:], 16)], _FP4_SCALES[blocks[:, :1]])


BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(32, 18, _q4_0),
    "Q4_1": BlockType(32, 20, _q4_1),
    "Q5_0": BlockType(32, 22, _q5_0),
    "Q5_1": BlockType(32, 24, _q5_1),
    "Q8_0": BlockType(32, 34, _q8_0),
    "Q2_K": BlockType(256, 84, _q2_k),
    "Q3_K": BlockType(256, 110, _q3_k),
    "Q4_K": BlockType(256, 144, _q4_k),
    "Q5_K": BlockType(256, 176, _q5_k),
    "Q6_K": BlockType(256, 210, _q6_k),
    "IQ4_NL": BlockType(32, 18, _iq4_nl),
    "IQ4_XS": BlockType(256, 136, _iq4_xs),
    "MXFP4": BlockType(32, 17, _mxfp4),
}
READ = (*PLAIN, *BLOCK_TYPES)

# The types by their numbers in a file; those that are not read have a name in messages all the same.
TYPE_NAMES: Mapping[int, str] = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1"))),
    **dict(enumerate(("Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K"), start=6)),
    **dict(enumerate(("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS"), start=16)),
    **dict(enumerate(("I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16"), start=24)),
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}


def row_bytes(kind: str, numbers: int) -> int | None:
    """The bytes of a row of that many numbers; None if it is no whole number of blocks."""
    if kind in PLAIN:
        return numbers * PLAIN[kind].itemsize
    block = BLOCK_TYPES[kind]
    return None if numbers % block.numbers else numbers // block.numbers * block.num_bytes
