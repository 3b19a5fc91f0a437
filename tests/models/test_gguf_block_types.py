"""Blocks of every type decode to the numbers that the package `gguf` gives, for random bytes."""

import mmap

import numpy as np
import pytest

from decodax.models.checkpoints.gguf.block_types import BLOCK_TYPES, READ, row_bytes
from decodax.models.checkpoints.gguf.tensors import BlockTensor
from tests.gguf_files import GOLDEN_GGUF


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN_GGUF / "blocks.npz") as file:
        return dict(file)


def same_bits(one, other):
    """Whether the bits are the same; NaN equals NaN, whose sign and payload mean nothing."""
    nan = np.isnan(other)
    return np.array_equal(np.isnan(one), nan) and np.array_equal(one.view(np.uint32)[~nan], other.view(np.uint32)[~nan])


def tensor(kind, blocks, rows):
    """A tensor of so many rows made of these blocks."""
    content = blocks.reshape(rows, -1)
    numbers = BLOCK_TYPES[kind].numbers * len(blocks) // rows if kind in BLOCK_TYPES else content.shape[1] // 2
    return BlockTensor("x", kind, (rows, numbers), content, mmap.mmap(-1, 1))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_numbers_are_those_of_gguf_to_the_last_bit(kind, golden):
    blocks, expected = golden[f"{kind}_blocks"], golden[f"{kind}_numbers"]
    decoded = BLOCK_TYPES[kind].decode(blocks)
    assert decoded.dtype == np.float32 and same_bits(decoded, expected)
    assert row_bytes(kind, expected.shape[1] * 3) == 3 * blocks.shape[1]
    assert row_bytes(kind, expected.shape[1] * 3 + 1) is None


def test_bfloat16_numbers_are_those_of_gguf(golden):
    rows = tensor("BF16", golden["BF16_blocks"], len(golden["BF16_blocks"])).rows(slice(0, 5))
    assert same_bits(rows.astype(np.float32), golden["BF16_numbers"])


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_rows_are_chosen_by_slices_and_by_lists(kind, golden):
    blocks = np.concatenate([golden[f"{kind}_blocks"]] * 3)[:14]
    several = tensor(kind, blocks, 7)
    expected = BLOCK_TYPES[kind].decode(blocks).reshape(7, -1)
    for index in (slice(0, 7), slice(2, 5), slice(1, 7, 3), np.array([6, 0, 3]), slice(4, 4)):
        assert same_bits(several.rows(index), expected[index])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_codes_and_scales_make_the_numbers(kind, golden):
    blocks, expected = golden[f"{kind}_blocks"][:4], golden[f"{kind}_numbers"][:4].reshape(2, -1)
    parts = tensor(kind, blocks, 2).parts(slice(0, 2))
    assert parts.codes.shape == expected.shape and parts.codes.dtype.itemsize == 1
    with np.errstate(all="ignore"):
        numbers = parts.codes.astype(np.float32).reshape(2, parts.scales.shape[1], -1) * parts.scales[..., None]
        if parts.offsets is not None:
            numbers = numbers + parts.offsets[..., None]
    assert same_bits(numbers.reshape(2, -1), expected)


def test_plain_numbers_have_no_codes(golden):
    with pytest.raises(ValueError, match="x is stored as BF16, which has no codes: read its rows"):
        tensor("BF16", golden["BF16_blocks"], 5).parts(slice(0, 1))


def test_all_types_that_are_read_are_listed():
    assert set(READ) == {"F32", "F16", "BF16", *BLOCK_TYPES}
