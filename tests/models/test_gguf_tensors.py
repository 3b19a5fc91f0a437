"""Wrapped GGUF tensors give the rows of Hugging Face's order, whichever rows are asked for."""

import mmap
import tracemalloc

import numpy as np
import pytest

from decodax.models.checkpoints.gguf.block_types import BLOCK_TYPES
from decodax.models.checkpoints.gguf.reordered import (
    Alternating,
    HalvesOfHeads,
    KeysAndValues,
    LessOne,
    OneOfStack,
    OneRow,
)
from decodax.models.checkpoints.gguf.tensors import BlockTensor
from decodax.models.checkpoints.name_map import TensorSlice, full_region, single_tensor, transfers
from decodax.models.checkpoints.name_map_selection import Expected, match_tensors

MAPPING, OTHER_MAPPING = mmap.mmap(-1, 1), mmap.mmap(-1, 1)


def stored(array, mapping=MAPPING):
    plain = np.ascontiguousarray(array, np.float32)
    matrix = plain.reshape(-1, plain.shape[-1])
    return BlockTensor("x", "F32", plain.shape, matrix.view(np.uint8), mapping)


def numbers(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def wrapped(kind):
    """A wrapper, and the array that it must give."""
    if kind == "heads":
        together = numbers(3 * 10, 7)  # three heads of 10, row 2 i + s is half s of pair i
        apart = np.concatenate(
            [together[head * 10 + half : head * 10 + 10 : 2] for head in range(3) for half in (0, 1)]
        )
        return HalvesOfHeads(stored(together), 3), apart
    if kind == "bias of heads":
        together = numbers(2 * 6)
        return HalvesOfHeads(stored(together), 2), together[[0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]]
    if kind == "expert":
        stack = numbers(5, 11, 3)
        return OneOfStack(stored(stack), 2), stack[2]
    if kind == "one row":
        return OneRow(stored(numbers(13))), numbers(13)[None]
    if kind == "norm":
        return LessOne(stored(numbers(13))), numbers(13) - np.float32(1)
    if kind == "latent":
        keys, values = numbers(3, 7, 5), numbers(3, 2, 7)  # three heads, a latent of 7
        expected = np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(21, 7)
        return KeysAndValues(stored(keys), stored(values, OTHER_MAPPING)), expected
    shape = (3, 5, 7) if kind == "alternating" else (3, 5)
    gate, up = numbers(*shape), numbers(*shape) + 1
    return Alternating(stored(gate), stored(up, OTHER_MAPPING)), np.stack([gate, up], axis=2).reshape(3, 10, *shape[2:])


KINDS = ["heads", "bias of heads", "expert", "one row", "norm", "alternating", "alternating biases", "latent"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_array(kind):
    tensor, expected = wrapped(kind)
    assert tensor.shape == expected.shape and tensor.dtype == np.float32 and tensor.kind == "F32"
    matrix = expected.reshape(-1, expected.shape[-1])
    count = len(matrix)
    assert all(mapping in (MAPPING, OTHER_MAPPING) for mapping in tensor.mappings)
    chosen = np.random.default_rng(1).permutation(count)[: max(1, count // 2)]
    for index in (
        slice(0, count),
        slice(0, 1),
        slice(1, count),
        slice(0, count, 2),
        slice(count // 3, count - 1),
        chosen,
    ):
        np.testing.assert_array_equal(tensor.rows(index), matrix[index])
    assert tensor.rows(slice(0, 0)).shape == (0, matrix.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_is_filled_in_small_pieces(kind):
    tensor, expected = wrapped(kind)
    target = np.full(expected.shape, np.nan, np.float32)
    region = full_region(expected.shape)
    for place, piece in transfers(TensorSlice("x"), tensor, expected.shape, region, target, 64):
        place[...] = piece
    np.testing.assert_array_equal(target, expected)


def test_both_files_of_a_pair_are_named():
    for kind in ("alternating", "latent"):
        tensor, _ = wrapped(kind)
        assert tensor.mappings == (MAPPING, OTHER_MAPPING) and tensor.label == "x with x"
    assert wrapped("expert")[0].label == "x[2]"


def test_a_pair_of_different_kinds_gives_float32():
    half = numbers(3, 5).astype(np.float16)
    other = BlockTensor("y", "F16", half.shape, half.view(np.uint8), MAPPING)
    tensor = Alternating(other, stored(numbers(3, 5)))
    assert tensor.kind == "F32" and tensor.rows(slice(0, 3)).dtype == tensor.dtype == np.float32
    assert Alternating(other, other).kind == "F16"


@pytest.mark.parametrize("head", ["same", "another number", "another shape"])
def test_a_head_beside_a_tied_embedding_must_be_the_same(head, monkeypatch):
    monkeypatch.setattr("decodax.models.checkpoints.name_map_selection._COMPARED_NUMBERS", 14)  # two rows at once
    embedding = numbers(11, 7)
    other = {"same": embedding, "another number": embedding.copy(), "another shape": embedding[:-1]}[head]
    if head == "another number":
        other[10, 3] += 1
    tensors = {"model.embed_tokens.weight": stored(embedding), "lm_head.weight": stored(other)}
    expected = Expected(
        {("embedding",): single_tensor("model.embed_tokens.weight")},
        {("embedding",): (11, 7)},
        tied_head=("lm_head.weight", "model.embed_tokens.weight"),
    )
    report = match_tensors(tensors, expected).report()
    assert bool(report) == (head != "same") and all("differs from the embedding" in line for line in report)


def test_reading_a_tensor_needs_little_memory_beside_the_target():
    kind, count = BLOCK_TYPES["Q4_K"], 2_000
    blocks = np.random.default_rng(0).integers(0, 100, (count, 8 * kind.num_bytes), np.uint8)
    tensor = BlockTensor("x", "Q4_K", (count, 8 * kind.numbers), blocks, MAPPING)
    target = np.empty(tensor.shape, np.float32)
    tracemalloc.start()
    try:
        region = full_region(tensor.shape)
        for place, piece in transfers(TensorSlice("x"), HalvesOfHeads(tensor, 10), tensor.shape, region, target, 2**20):
            place[...] = piece
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20 < target.nbytes
    finally:
        tracemalloc.stop()
