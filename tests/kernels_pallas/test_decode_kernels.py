"""flash_decode, paged_decode and gather_decode against NumPy, on XLA and in the interpreters of TPU and GPU kernels.

The GPU kernels run a few of these cases; test_decode_kernels_gpu.py has what is awkward for them. What no query may
read (slots behind the lengths, pages nobody needs) is NaN throughout.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.kernels_pallas.decode import kernel_tpu
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.flash_decode import flash_decode, select_flash_decode
from decodax.kernels_pallas.gather_decode import gather_decode, select_gather_decode
from decodax.kernels_pallas.paged_decode import paged_decode, select_paged_decode
from tests.kernels_pallas import oracles_decode as oracle

implementations = pytest.mark.parametrize("implementation", ("xla", "tpu_interpreted"))

# float32: sums of at most 1,000 products and weights, each rounded to 2^-24; errors of the square root of the number.
FLOAT32_TOLERANCE = 1e-5
# bfloat16 keeps 8 bits: a weight and the output are rounded by at most 2^-9 each, relative to the largest value.
BFLOAT16_TOLERANCE = 2.0**-8


@dataclass(frozen=True)
class Case:
    """One call: sizes, lengths per row (or per row and head) and what else is asked for."""

    lengths: Any
    num_queries: int = 1
    num_kv_heads: int = 2
    group: int = 1
    head_size: int = 128
    value_size: int = 128
    capacity: int = 128
    num_new: int = 0
    softcap: float | None = None
    first: Any = None
    num_sink_tokens: int = 0
    sinks: bool = False
    page_tokens: int = 16
    heads_per_page: int = 0
    num_tables: int = 1
    lists: Any = None
    unfit: tuple[str, ...] = ()
    on_gpu: bool = False
    dtype: Any = jnp.float32

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    def arrays(self, seed: int = 0) -> dict[str, Any]:
        """Queries, a contiguous cache with NaN behind the lengths, and new tokens under a random tree."""
        random = np.random.default_rng(seed)
        batch, heads = len(self.lengths), self.num_kv_heads
        normal = lambda *shape: jnp.asarray(random.normal(size=shape), self.dtype)
        key, value = (normal(batch, heads, self.capacity, size) for size in (self.head_size, self.value_size))
        per_head = np.broadcast_to(np.asarray(self.lengths).reshape(batch, -1), (batch, heads))
        filled = jnp.asarray(np.arange(self.capacity) < per_head[..., None])[..., None]
        arrays = {
            "query": normal(batch, self.num_queries, heads * self.group, self.head_size),
            "key": jnp.where(filled, key, jnp.nan),
            "value": jnp.where(filled, value, jnp.nan),
            "new": None,
            "sink_logits": jnp.asarray(random.normal(size=heads * self.group), jnp.float32) if self.sinks else None,
        }
        if self.num_new:
            allowed = random.random((batch, self.num_queries, self.num_new)) < 0.5
            allowed[:, :, -1] = False  # a token that no query reads: its values may be anything
            key, value = (normal(batch, heads, self.num_new, size) for size in (self.head_size, self.value_size))
            arrays["new"] = NewTokens(key, value.at[:, :, -1].set(jnp.nan), jnp.asarray(allowed))
        return arrays

    def options(self, arrays: dict[str, Any]) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "sink_logits": arrays["sink_logits"]}

    def window(self) -> dict[str, Any]:
        if self.first is None:
            return {}
        return {"first": jnp.asarray(self.first, jnp.int32), "num_sink_tokens": self.num_sink_tokens}

    def expected(self, arrays: dict[str, Any], slots: Any) -> tuple[np.ndarray, np.ndarray]:
        """slots(b, t, k): what query t of row b reads of head k."""
        key, value = (np.asarray(arrays[name], np.float64) for name in ("key", "value"))

        def cached(b: int, t: int, n: int) -> tuple[np.ndarray, np.ndarray]:
            k = n // self.group
            read = np.asarray(slots(b, t, k), int)
            return key[b, k, read], value[b, k, read]

        return oracle.decode(arrays["query"], cached, arrays["new"], **self.options(arrays))

    def windowed(self, b: int, t: int, k: int) -> list[int]:
        length = np.asarray(self.lengths).reshape(len(self.lengths), -1)[b]
        first = 0 if self.first is None else self.first[b][t]
        return oracle.visible(length[k % len(length)], first, self.num_sink_tokens)


def check(case: Case, implementation: str, call: Any, expected: tuple[np.ndarray, np.ndarray]) -> None:
    """Runs it (or sees it refused where it does not fit) and compares with what is expected."""
    if implementation.partition("_")[0] in case.unfit:
        with pytest.raises(NotImplementedError, match="use implementation='xla'"):
            call(implementation=implementation)
        return
    output, log_sum_exp = jax.jit(partial(call, implementation=implementation))()
    assert output.dtype == case.dtype and log_sum_exp.dtype == jnp.float32
    assert output.shape == expected[0].shape
    tolerance = FLOAT32_TOLERANCE if case.dtype == jnp.float32 else BFLOAT16_TOLERANCE
    largest = max(1.0, np.abs(expected[0]).max())
    np.testing.assert_allclose(np.asarray(output, np.float64), expected[0], rtol=0, atol=tolerance * largest)
    nothing = np.isneginf(expected[1])
    np.testing.assert_array_equal(np.isneginf(np.asarray(log_sum_exp)), nothing)
    np.testing.assert_allclose(
        np.asarray(log_sum_exp)[~nothing], expected[1][~nothing], rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE
    )


def everywhere(cases: dict[str, Case]) -> Any:
    """Every case on XLA and for TPU, some for GPU: its interpreter takes seconds."""
    also = {name: ("gpu_interpreted",) if case.on_gpu else () for name, case in cases.items()}
    runs = [(name, where) for name in cases for where in ("xla", "tpu_interpreted", *also[name])]
    return pytest.mark.parametrize(("name", "implementation"), runs)


FLASH = {
    "63 slots, one head, empty row, length 1": Case([0, 1, 63], num_kv_heads=1, group=5, capacity=63, num_new=2),
    "1000 slots, tree, softcap, sinks": Case(
        [1000, 517], 5, group=3, value_size=256, capacity=1000, num_new=9, softcap=3.0, sinks=True
    ),
    "windows and first slots, 8 heads, head size 64, no new tokens": Case(
        [384, 200, 0, 384],
        3,
        8,
        head_size=64,
        value_size=64,
        capacity=384,
        first=[[0, 140, 150], [190, 200, 250], [0, 0, 0], [383, 384, 500]],
        num_sink_tokens=5,
    ),
    "a window alone: blocks before it are skipped": Case(
        [510, 300], 2, capacity=512, first=[[380, 390], [280, 290]], num_new=3, on_gpu=True
    ),
    "head sizes 80 and 96": Case([200], 2, head_size=80, value_size=96, capacity=256, num_new=3),
    "head sizes 192 and 128, 100 slots": Case([100, 99], 1, 2, 2, 192, 128, 100),
    "bfloat16, head size 256": Case(
        [256, 130], 2, 1, 4, 256, 256, 256, num_new=17, dtype=jnp.bfloat16, first=[[0, 1], [2, 129]]
    ),
}


@everywhere(FLASH)
@pytest.mark.quick_cases(6)
def test_flash_decode_is_attention(name, implementation):
    case = FLASH[name]
    arrays = case.arrays()
    operands = [arrays[name] for name in ("query", "key", "value")]
    length = jnp.asarray(case.lengths, jnp.int32)
    call = partial(flash_decode, *operands, length, arrays["new"], **case.options(arrays), **case.window())
    check(case, implementation, call, case.expected(arrays, case.windowed))


def paged(case: Case, arrays: dict[str, Any]) -> tuple[Any, ...]:
    """The same cache as pages in random order, with NaN pages between, and tables that are wild where nobody looks."""
    random = np.random.default_rng(1)
    heads, size = case.heads_per_page or case.num_kv_heads, case.page_tokens
    batch, num_pages = len(case.lengths), case.capacity // size
    lengths = np.broadcast_to(np.asarray(case.lengths).reshape(batch, -1), (batch, case.num_tables))
    place = random.permutation(batch * case.num_tables * num_pages + 3)
    table = np.full((batch, case.num_tables, num_pages), 10**6)
    shape = (len(place), heads, size)
    pools = {name: np.full((*shape, arrays[name].shape[-1]), np.nan) for name in ("key", "value")}
    for b, table_number, page in np.ndindex(*table.shape):
        lowest = 0 if case.first is None else min(case.first[b])
        is_needed = (page + 1) * size > lowest or page * size < case.num_sink_tokens
        if page * size < lengths[b, table_number] and is_needed:
            number = place[np.ravel_multi_index((b, table_number, page), table.shape)]
            table[b, table_number, page] = number
            for head in range(heads):
                k = table_number if case.num_tables > 1 else head
                for name, pool in pools.items():
                    tokens = np.asarray(arrays[name], np.float64)[b, k, page * size : (page + 1) * size]
                    pool[number, head if heads > 1 else 0] = tokens
    pages = [jnp.asarray(pools[name], case.dtype) for name in ("key", "value")]
    return *pages, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32)


PAGED = {
    "pages of 16 with all heads": Case([0, 77, 208], 4, 2, 2, capacity=208, num_new=5),
    "a page per head, lengths per head": Case(
        np.arange(16).reshape(2, 8) * 6, 1, 8, capacity=96, page_tokens=32, heads_per_page=1, num_tables=8, num_new=2
    ),
    "tables per head, pages with all heads, windows, sinks": Case(
        [[300, 150], [1, 0]],
        2,
        capacity=320,
        page_tokens=64,
        num_tables=2,
        first=[[140, 145], [0, 7]],
        num_sink_tokens=3,
        sinks=True,
    ),
    "one head, pages of 64, value size 256": Case(
        [130], 3, 1, 4, 128, 256, 192, page_tokens=64, num_new=4, softcap=2.0
    ),
    "head size 96": Case([40], 1, head_size=96, capacity=64),
    "bfloat16": Case([250, 0], 1, 2, 3, capacity=256, num_new=2, page_tokens=64, dtype=jnp.bfloat16, on_gpu=True),
}


@everywhere(PAGED)
@pytest.mark.quick_cases(5)
def test_paged_decode_is_attention(name, implementation):
    case = PAGED[name]
    arrays = case.arrays()
    options = case.options(arrays) | case.window()
    call = partial(paged_decode, arrays["query"], *paged(case, arrays), arrays["new"], **options)
    check(case, implementation, call, case.expected(arrays, case.windowed))


GATHER = {
    "pages of 16, a partial one first, one behind the length": Case(
        [100, 0, 17], 3, capacity=112, num_new=4, lists=[[[6, 0, 2], [3, 1]], [[0], []], [[2, 1, 0], [0]]]
    ),
    "pages of 128, head size 64": Case(
        [384, 250], 1, 1, 4, 64, 64, 384, page_tokens=128, lists=[[[2, 0]], [[1]]], sinks=True, softcap=1.0
    ),
    "pages of 64, bfloat16": Case(
        [256],
        2,
        2,
        2,
        capacity=256,
        page_tokens=64,
        lists=[[[3, 0], [1, 2, 0]]],
        num_new=1,
        dtype=jnp.bfloat16,
        on_gpu=True,
    ),
    "single tokens": Case(
        [50, 9],
        1,
        page_tokens=1,
        lists=[[[49, 3, 60], [1]], [[8, 9], [2, 0, 4]]],
        unfit=("tpu", "gpu"),
        num_new=2,
        on_gpu=True,
    ),
}


def gathered(case: Case) -> tuple[Any, tuple[np.ndarray, np.ndarray]]:
    """The call for a case with lists of pages, wild behind their ends, and what it should give."""
    arrays = case.arrays()
    count = np.asarray([[len(pages) for pages in row] for row in case.lists])
    index = np.full((*count.shape, count.max() + 1), 10**6)
    for b, k in np.ndindex(*count.shape):
        index[b, k, : count[b, k]] = case.lists[b][k]
    operands = [arrays[name] for name in ("query", "key", "value")]
    lists = [jnp.asarray(x, jnp.int32) for x in (index, count, case.lengths)]
    options = case.options(arrays) | {"block_tokens": case.page_tokens}

    def slots(b: int, t: int, k: int) -> list[int]:
        pages = [range(page * case.page_tokens, (page + 1) * case.page_tokens) for page in case.lists[b][k]]
        return [slot for page in pages for slot in page if slot < case.lengths[b]]

    return partial(gather_decode, *operands, *lists, arrays["new"], **options), case.expected(arrays, slots)


@everywhere(GATHER)
@pytest.mark.quick_cases(3)
def test_gather_decode_is_attention(name, implementation):
    check(GATHER[name], implementation, *gathered(GATHER[name]))


def test_more_blocks_than_buffers(monkeypatch):
    """Blocks of one page run through the buffers several times, from one item into the next."""
    monkeypatch.setattr(kernel_tpu, "BLOCK_BYTES", 1)
    case = Case([1000, 0, 130, 1], num_new=2, capacity=1000)
    arrays = case.arrays()
    operands = (arrays["key"], arrays["value"], jnp.asarray(case.lengths, jnp.int32))
    call = partial(flash_decode, arrays["query"], *operands, arrays["new"], **case.options(arrays))
    check(case, "tpu_interpreted", call, case.expected(arrays, case.windowed))


def test_lists_of_more_rows_than_scalar_memory_holds(monkeypatch):
    """They come row by row, in a call each."""
    monkeypatch.setattr(kernel_tpu, "LIST_BYTES", 4 * 8)
    case = Case([450, 0, 130], num_new=2, capacity=512, page_tokens=64)
    arrays = case.arrays()
    call = partial(paged_decode, arrays["query"], *paged(case, arrays), arrays["new"], **case.options(arrays))
    check(case, "tpu_interpreted", call, case.expected(arrays, case.windowed))
    case = Case([32, 30], capacity=32, lists=[[[0, 1], [0]], [[1], [0, 1]]])
    check(case, "tpu_interpreted", *gathered(case))


@implementations
def test_parts_merge_by_their_log_sum_exp(implementation):
    """The start of the cache, the rest of it and the new tokens, each alone, give the whole."""
    case = Case([100, 30], 2, group=2, capacity=128, num_new=3)
    arrays = case.arrays()
    cache = (arrays["key"], arrays["value"])
    split, lengths = (jnp.asarray(x, jnp.int32) for x in ([40, 30], case.lengths))
    run = partial(flash_decode, arrays["query"], *cache, scale=case.scale, implementation=implementation)

    @jax.jit
    def parts() -> list[Any]:
        rest = {"first": jnp.broadcast_to(split[:, None], (2, 2))}
        return [run(split), run(lengths, **rest), run(jnp.zeros_like(lengths), arrays["new"])]

    outputs, log_sum_exps = (np.asarray(x, np.float64) for x in zip(*parts(), strict=True))
    weights = np.exp(log_sum_exps)  # the last part, of queries that read no new token, has the weight 0
    merged = (weights[..., None] * outputs).sum(0) / weights.sum(0)[..., None]
    expected = case.expected(arrays, case.windowed)
    np.testing.assert_allclose(merged, expected[0], atol=FLOAT32_TOLERANCE * np.abs(expected[0]).max())
    np.testing.assert_allclose(np.log(weights.sum(0)), expected[1], rtol=FLOAT32_TOLERANCE)


def sds(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_what_does_not_fit_is_told_and_runs_on_xla():
    query, cache = sds(2, 1, 4, 128), sds(2, 2, 100, 128)
    assert select_flash_decode(query, cache, cache).implementation == "xla"
    assert "there are no kernels for cpu" in select_flash_decode(query, cache, cache).reason
    refused = {
        "all operands must be float32 or all bfloat16, got float16": sds(2, 2, 128, 128, dtype=jnp.float16),
        "in multiples of 8 slots, got 132": sds(2, 2, 132, 128),
    }
    for words, cache in refused.items():
        query = sds(2, 1, 4, 128, dtype=cache.dtype)
        with pytest.raises(NotImplementedError, match=words):
            select_flash_decode(query, cache, cache, implementation="tpu")
    pages, many = sds(9, 2, 16, 128), sds(2, 1, 2**18, dtype=jnp.int32)
    with pytest.raises(NotImplementedError, match="page numbers of one row must fit into 524288 bytes, got 1048576"):
        select_paged_decode(query, pages, pages, many, implementation="tpu")
    query, cache, table = sds(2, 1, 4, 128), sds(2, 2, 128, 128), sds(2, 1, 4, dtype=jnp.int32)
    with pytest.raises(NotImplementedError, match="in multiples of 8 slots, got 1"):
        select_gather_decode(query, cache, cache, table, block_tokens=1, implementation="tpu")


def test_bad_operands_are_refused_before_a_kernel_is_launched():
    zeros = jnp.zeros
    query, cache, length = zeros((2, 3, 4, 16)), zeros((2, 2, 32, 16)), jnp.asarray([3, 32])
    run = partial(flash_decode, scale=1.0)
    with pytest.raises(ValueError, match=r"length must be in 0\.\.32, got 3\.\.33: the cache holds no more tokens"):
        run(query, cache, cache, length + jnp.asarray([0, 1]))
    with pytest.raises(ValueError, match=r"1 to 64 queries \(T\) per row, got 65: use flash_prefill for more"):
        run(zeros((2, 65, 4, 16)), cache, cache, length)
    with pytest.raises(ValueError, match="the 3 query heads must be a multiple of the 2 key-value heads"):
        run(zeros((2, 3, 3, 16)), cache, cache, length)
    with pytest.raises(ValueError, match=r"num_sink_tokens must be in 0\.\.32 .* got 33"):
        run(query, cache, cache, length, num_sink_tokens=33)
    new = NewTokens(zeros((2, 2, 4, 16)), zeros((2, 2, 4, 16)), zeros((2, 3, 5), bool))
    with pytest.raises(ValueError, match=r"new.allowed must have shape \(2, 3, 4\) .* got \(2, 3, 5\)"):
        run(query, cache, cache, length, new)
    long = NewTokens(zeros((2, 2, 129, 16)), zeros((2, 2, 129, 16)), zeros((2, 3, 129), bool))
    with pytest.raises(ValueError, match=r"new tokens \(U\) must be 1 to 128, got 129; commit some to the cache first"):
        run(query, cache, cache, length, long)

    pages, table, lengths = zeros((5, 2, 8, 16)), jnp.asarray([[[0, 4]], [[9, 9]]]), jnp.asarray([[16], [0]])
    run = partial(paged_decode, query, pages, pages, scale=1.0)
    run(table, lengths)
    with pytest.raises(ValueError, match=r"table must be in 0\.\.4, got 0\.\.9: an entry that is read must be one of"):
        run(table, lengths + 1 - lengths // 16)
    with pytest.raises(ValueError, match=r"length must be in 0\.\.16, got 1\.\.17: a table lists 2 pages of 8 tokens"):
        run(table, lengths + 1)
    with pytest.raises(
        ValueError, match=r"heads in a page \(Kp\) must be 1 or the number of key-value heads, 3, got 2"
    ):
        run(zeros((2, 3, 2), int), zeros((2, 3), int))

    run = partial(gather_decode, query, cache, cache, scale=1.0, length=length)
    index, count = jnp.asarray([[[0, 9], [3, 9]]] * 2), jnp.full((2, 2), 1)
    run(index=index, count=count, block_tokens=8)
    with pytest.raises(ValueError, match=r"index must be in 0\.\.3, got 0\.\.9: the cache has pages of 8 tokens"):
        run(index=index, count=count + 1, block_tokens=8)
    with pytest.raises(ValueError, match=r"count must be in 0\.\.2, got 3\.\.3: a list holds no more pages"):
        run(index=index, count=count + 2, block_tokens=8)
    with pytest.raises(ValueError, match=r"block_tokens must divide the cache's 32 slots \(S\), got 12"):
        run(index=index, count=count, block_tokens=12)


@implementations
def test_traced_indices_outside_are_clipped_and_nothing_beyond_is_read(implementation):
    """Inside `jit` values are not known: a length beyond the cache counts as the whole cache."""
    case = Case([128], capacity=128)
    arrays = case.arrays()
    run = jax.jit(partial(flash_decode, scale=case.scale, implementation=implementation))
    output, _ = run(arrays["query"], arrays["key"], arrays["value"], jnp.asarray([1000], jnp.int32))
    np.testing.assert_allclose(output, case.expected(arrays, case.windowed)[0], atol=1e-5)
