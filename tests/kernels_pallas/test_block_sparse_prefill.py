"""Block-sparse prefill: kernels and the XLA path equal NumPy, and the kernels compile for absent chips."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.kernels_pallas import selection
from decodax.kernels_pallas.block_sparse_prefill import (
    BlockLists,
    block_sparse_prefill,
    select_block_sparse_prefill,
)
from decodax.kernels_pallas.block_sparse_prefill.shapes import SHAPES
from tests.kernels_pallas import oracles_block_sparse_prefill as oracle
from tests.kernels_pallas.ahead_of_time import CHIPS, compile_for_tpu, count_kernels

IMPLEMENTATIONS = ["xla", "tpu_interpreted", "gpu_interpreted"]


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call. What no query attends to is NaN: slots that are not filled, and blocks that no list names."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    capacity: int
    head_size: int
    value_size: int
    num_lists: int
    query_block: int
    key_block: int
    offset: tuple[int, ...]
    length: tuple[int, ...]
    softcap: float | None = None
    descending: bool = False  # lists from the last block to the first
    share: float = 0.6  # of blocks that are listed

    @functools.cache  # noqa: B019
    def operands(self, dtype):
        numbers = np.random.default_rng(0)
        batch = len(self.offset)
        query, key, value = (
            numbers.normal(size=(batch, *shape)).astype(np.float32)
            for shape in (
                (self.num_tokens, self.num_heads, self.head_size),
                (self.num_kv_heads, self.capacity, self.head_size),
                (self.num_kv_heads, self.capacity, self.value_size),
            )
        )
        blocks = (-(-self.num_tokens // self.query_block), -(-self.capacity // self.key_block))
        reads = numbers.random((batch, self.num_lists, *blocks)) < self.share
        reads[0, 0, 0] = False  # a query block that attends to nothing
        slots = np.arange(self.capacity)
        for b in range(batch):
            filled = min(self.length[b], self.offset[b] + self.num_tokens)
            for kv_head in range(self.num_kv_heads):
                lists = reads[b].reshape(self.num_kv_heads, -1, *blocks)[kv_head]
                unread = (slots >= filled) | ~lists.any(axis=(0, 1))[slots // self.key_block]
                key[b, kv_head, unread] = value[b, kv_head, unread] = np.nan
        arrays = (jnp.asarray(array.astype(dtype)) for array in (query, key, value))
        return (*arrays, self.lists(reads)), reads

    def lists(self, reads):
        order = slice(None, None, -1 if self.descending else 1)
        start = np.pad(np.cumsum(reads.sum(axis=3), axis=2), ((0, 0), (0, 0), (1, 0)))
        index = np.full((*reads.shape[:2], start.max() + 2), 10**6)  # two entries that no list holds
        for place in np.ndindex(reads.shape[:3]):
            row, head, block = place
            index[row, head, start[place] : start[row, head, block + 1]] = np.flatnonzero(reads[place])[order]
        return BlockLists(jnp.array(start, jnp.int32), jnp.array(index, jnp.int32), self.query_block, self.key_block)

    def options(self):
        position = {"offset": jnp.array(self.offset, jnp.int32), "length": jnp.array(self.length, jnp.int32)}
        return {"scale": 0.2, "softcap": self.softcap, **position}

    @functools.cache  # noqa: B019
    def expected(self, dtype):
        (query, key, value, lists), reads = self.operands(dtype)
        blocks = (lists.query_block, lists.key_block)
        return oracle.attention(query, key, value, reads, *blocks, 0.2, self.offset, self.length, self.softcap)


# Each mixes several awkward things.
CASES = {
    "100 tokens, a list per head, behind a prefix": Case(100, 4, 2, 168, 64, 64, 4, 64, 64, (0, 40), (100, 130)),
    "63 tokens, a list per group, rows of length 1 and 0": Case(
        63, 4, 1, 200, 128, 192, 1, 64, 128, (0, 0, 130), (1, 0, 193), softcap=3.0
    ),
    "1000 tokens, lists of more than 128 entries": Case(1000, 1, 1, 1000, 64, 64, 1, 64, 64, (0,), (1000,), share=0.9),
    "8 key-value heads, late blocks first": Case(
        70, 8, 8, 264, 80, 96, 8, 64, 64, (190,), (260,), descending=True, share=0.5
    ),
    "one query of a block, larger blocks of queries": Case(129, 2, 1, 136, 256, 256, 2, 128, 64, (0,), (129,)),
}


def assert_close(result, expected, value, dtype):
    output, lse = (np.asarray(array, np.float64) for array in result)
    expected_output, expected_lse = expected
    assert result[0].dtype == dtype and result[1].dtype == jnp.float32
    # float32: sums of at most 1000 terms. bfloat16: weights and outputs are rounded to 8 bits, each by 2^-9 at most.
    largest = np.nanmax(np.abs(np.asarray(value, np.float64)))
    tolerance = 1e-5 * np.abs(expected_output).max() if dtype == jnp.float32 else 2**-8 * largest
    np.testing.assert_allclose(output, expected_output, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    reads_something = np.isfinite(expected_lse)
    np.testing.assert_allclose(lse[reads_something], expected_lse[reads_something], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in CASES] + [(name, jnp.bfloat16) for name in list(CASES)[:1]],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.quick_cases(5)
def test_equals_numpy(name, dtype, implementation):
    case = CASES[name]
    operands, _ = case.operands(dtype)
    options = {**case.options(), "implementation": implementation}
    call = functools.partial(block_sparse_prefill, **options)
    result = (jax.jit(call) if dtype == jnp.float32 else call)(*operands)  # compiled as a whole, and eagerly
    assert_close(result, case.expected(dtype), operands[2], dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_jit_entries_out_of_range_count_as_empty(implementation):
    """Entries beyond the keys, starts beyond the lists, a length beyond the keys: only an eager call refuses them."""
    case = Case(128, 1, 1, 128, 64, 64, 1, 64, 64, (0,), (128,))
    (query, key, value, _), _ = dataclasses.replace(case, share=2.0).operands(jnp.float32)
    start = jnp.array([[[-5, 2, 99]]], jnp.int32)
    index = jnp.array([[[0, 2**31 - 1, -1, 1]]], jnp.int32)
    lists = BlockLists(start, index, 64, 64)
    reads = np.array([[[[True, False], [False, True]]]])

    def attend(query, key, value, lists, length):
        return block_sparse_prefill(query, key, value, lists, scale=0.2, length=length, implementation=implementation)

    result = jax.jit(attend)(query, key, value, lists, jnp.array([1000]))
    expected = oracle.attention(query, key, value, reads, 64, 64, 0.2, (0,), (128,), None)
    assert_close(result, expected, value, jnp.float32)


def test_offset_and_length_have_defaults():
    case = Case(100, 2, 1, 120, 64, 64, 2, 64, 64, (0,), (100,))
    operands, _ = case.operands(jnp.float32)
    assert select_block_sparse_prefill(*operands).reason == "there are no kernels for cpu"
    assert_close(block_sparse_prefill(*operands, scale=0.2), case.expected(jnp.float32), operands[2], jnp.float32)


def test_lists_hold_the_blocks_of_a_mask():
    reads = np.random.default_rng(1).random((2, 3, 5, 7)) < 0.4
    lists = BlockLists.from_mask(jnp.asarray(reads), query_block=64, key_block=128)
    traced = jax.jit(lambda reads: BlockLists.from_mask(reads, query_block=64, key_block=128, capacity=20))
    for some in (lists, traced(jnp.asarray(reads))):
        starts, index = np.asarray(some.start), np.asarray(some.index)
        for row, head, block in np.ndindex(2, 3, 5):
            start, end = starts[row, head, block : block + 2]
            assert index[row, head, start:end].tolist() == np.flatnonzero(reads[row, head, block]).tolist()
    assert lists.index.shape[2] == reads.sum(axis=(2, 3)).max()
    few = jax.jit(lambda reads: BlockLists.from_mask(reads, query_block=64, key_block=128, capacity=3))
    some = few(jnp.asarray(reads))
    assert some.start.max() == 3 and some.index.shape == (2, 3, 3)
    np.testing.assert_array_equal(some.index, lists.index[:, :, :3])


def test_lists_that_are_too_short_are_refused():
    reads = jnp.ones((1, 1, 2, 3), bool)
    with pytest.raises(ValueError, match=r"capacity must be at least 6 .* got 5"):
        BlockLists.from_mask(reads, query_block=64, key_block=64, capacity=5)
    with pytest.raises(ValueError, match="give a capacity"):
        jax.jit(lambda reads: BlockLists.from_mask(reads, query_block=64, key_block=64))(reads)


def bad_lists(start=((0, 1, 2),), index=((0, 1),), query_block=64):
    return BlockLists(jnp.array([start], jnp.int32), jnp.array([index], jnp.int32), query_block, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": bad_lists(start=((0, 2, 1),))}, "must rise from 0 to at most the 2 entries"),
        ({"blocks": bad_lists(start=((0, 1, 3),))}, "must rise from 0 to at most the 2 entries"),
        ({"blocks": bad_lists(index=((0, 2),))}, r"key blocks in 0\.\.1, got 2"),
        ({"blocks": bad_lists(start=((0, 0, 2),), index=((1, 1),))}, "block 1 twice in row 0, .*, query block 1"),
        ({"blocks": bad_lists(start=((0, 1),))}, "need 3 starts .*, got 2"),
        ({"blocks": bad_lists(query_block=0)}, "at least one token"),
        ({"blocks": bad_lists(start=((0, 1, 2),) * 3, index=((0, 1),) * 3)}, "got 3 sets"),
        ({"blocks": bad_lists(index=((),))}, "room for one entry"),
        ({"length": jnp.array([129])}, r"length must be in 0\.\.128, got 129"),
        ({"offset": jnp.array([-1])}, r"offset must be in 0\.\.128, got -1"),
        ({"query": jnp.zeros((1, 128, 2, 64), jnp.bfloat16)}, "one dtype"),
        ({"key": jnp.zeros((1, 3, 128, 64)), "value": jnp.zeros((1, 3, 128, 64))}, "multiple of the 3 key-value heads"),
    ],
)
def test_bad_input_is_refused(change, message):
    query, keys = jnp.zeros((1, 128, 2, 64)), jnp.zeros((1, 1, 128, 64))
    call = {"query": query, "key": keys, "value": keys, "blocks": bad_lists(), **change}
    with pytest.raises(ValueError, match=message):
        block_sparse_prefill(**call, scale=0.2)


@pytest.mark.parametrize(
    ("backend", "change", "message"),
    [
        ("tpu", {"capacity": 100}, "multiple of 8 tokens .* got 100"),
        ("tpu", {"key_block": 32}, "key blocks of 64, 128 or 256 tokens, got 32"),
        ("tpu", {"head_size": 320}, "at most 256 numbers, got 320"),
        ("tpu", {"dtype": jnp.float16}, "takes float32 and bfloat16, got float16"),
        ("gpu", {"capacity": 63}, "room for a multiple of 8 tokens from 64 on, got 63"),
        ("gpu", {"capacity": 100}, "room for a multiple of 8 tokens from 64 on, got 100"),
        ("gpu", {"query_block": 32}, "query blocks of a multiple of 64 tokens, got 32"),
        ("gpu", {"head_size": 72}, "multiple of 16 numbers up to 256, got 72"),
        ("gpu", {"dtype": jnp.float32}, "takes bfloat16 and float16, got float32"),
    ],
)
def test_xla_runs_what_does_not_fit_the_kernels(backend, change, message, monkeypatch):
    sizes = {name: size for name, size in change.items() if name != "dtype"}
    case = dataclasses.replace(Case(63, 2, 1, 128, 64, 64, 2, 64, 64, (0,), (63,), share=2.0), **sizes)
    operands, _ = case.operands(change.get("dtype", jnp.bfloat16))
    with pytest.raises(NotImplementedError, match=message):
        block_sparse_prefill(*operands, scale=0.2, implementation=backend)
    monkeypatch.setattr(selection, "backend_of_this_device", lambda: (backend, "the device is one"))
    chosen = select_block_sparse_prefill(*operands)
    assert chosen.implementation == "xla" and chosen.reason.startswith(f"the device is one, but the {backend.upper()}")


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "name",
    [
        "llama3-8b, 64k, 10 % of the blocks",
        "llama3-8b, 2k after 126k, 10 % of the blocks",
        "phi3-mini, 16k",
    ],
)
def test_compiles_for_tpu(name, chip):
    shape = SHAPES[name]

    def attend(operands):
        return block_sparse_prefill(**operands, **shape.options(), implementation="tpu")

    operands = shape.operands()
    compiled = compile_for_tpu(chip, attend, operands)
    assert count_kernels(compiled, "block_sparse_prefill") == 1
    # Queries and outputs are transposed outside the kernel (their heads padded to 128 lanes), keys and values are not.
    query = operands["query"]
    padded = query.size // query.shape[3] * 128 * query.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 2.1 * padded


@pytest.mark.parametrize("name", list(SHAPES)[::2])
def test_lowers_for_hopper(name):
    shape = SHAPES[name]

    def block_sparse(operands):
        return block_sparse_prefill(**operands, **shape.options(), implementation="gpu")

    exported = jax.export.export(jax.jit(block_sparse), platforms=["cuda"])(shape.operands())
    assert exported.mlir_module().count("stablehlo.custom_call @mosaic_gpu") == 1


def test_shapes_count_their_bytes_and_flops():
    """A shape small enough to count by hand: 3 query blocks of 2 after 1 token, key blocks of 2, two blocks each."""
    shape = dataclasses.replace(
        SHAPES["phi3-mini, 16k"], num_tokens=5, num_heads=3, num_kv_heads=1, num_lists=1, head_size=7, offset=1,
        query_block=2, key_block=2, fraction=1.0, most=2, dtype=jnp.float32,
    )  # fmt: skip
    # Slots 1, 2 attend to blocks 0, 1: 2 + 3 pairs. 3, 4 to 0 and 2: 2 + 3. 5 to 0 and one of the others: 4.
    assert shape.blocks_listed() == 2 + 2 + 2
    assert shape.flops() == 2 * (7 + 7) * 3 * (5 + 5 + 4)
    assert shape.bytes_listed() == 6 * 2 * (7 + 7) * 4
    assert shape.bytes_moved() == 4 * (14 * 5 * 3 + 14 * 6 + 5 * 3 + 6 + 4)
    lists = shape.random_operands(0)["blocks"]
    assert lists.start.tolist() == [[[0, 2, 4, 6]]] and lists.index[0, 0, :5].tolist() == [0, 1, 0, 2, 0]
