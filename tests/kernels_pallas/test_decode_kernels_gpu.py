"""The decode kernels for Hopper GPUs, interpreted on CPU, equal a NumPy oracle in float64.

The interpreter starts memory as NaN, so unused rows of a wgmma and unwritten partial results are poison; so are
the cached tokens that no query attends to, and entries after the ends of tables and lists. Cases are few, and each
mixes several awkward sizes, as the interpreter takes seconds for each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from decodax.kernels_pallas import selection
from decodax.kernels_pallas.decode import kernel_gpu
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.decode.tiles_gpu import OrderedTiles, ordered
from decodax.kernels_pallas.flash_decode import flash_decode, select_flash_decode
from decodax.kernels_pallas.flash_decode import shapes as flash_shapes
from decodax.kernels_pallas.gather_decode import gather_decode, select_gather_decode
from decodax.kernels_pallas.gather_decode import shapes as gather_shapes
from decodax.kernels_pallas.paged_decode import paged_decode, select_paged_decode
from decodax.kernels_pallas.paged_decode import shapes as paged_shapes

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
# Scores and sums are float32. Weights are rounded to the values' dtype and so is the output: an error of half a unit in
# the last place each, relative to the largest value. float32: sums of 1,000 products in another order.
TOLERANCE = {F32: 1e-5, BF16: 2.0**-8, F16: 2.0**-10}
LSE_TOLERANCE = 1e-5


def attend(query, tokens, reads, *, scale, softcap=None, sink_logits=None):
    """Query [B, T, N, H]; tokens(b, k) the keys and values, reads(b, t, k) the indices of those that it attends to."""
    query = np.asarray(query, np.float64)
    batch, num_queries, num_heads, _ = query.shape
    group = num_heads // tokens.num_kv_heads
    output = np.zeros((batch, num_queries, num_heads, tokens(0, 0)[1].shape[1]))
    lse = np.full((batch, num_queries, num_heads), -np.inf)
    for row, query_index, head in np.ndindex(batch, num_queries, num_heads):
        key, value = tokens(row, head // group)
        index = reads(row, query_index, head // group)
        score = key[index] @ query[row, query_index, head] * scale
        value = value[index]
        if softcap is not None:
            score = softcap * np.tanh(score / softcap)
        if sink_logits is not None:
            score = np.append(score, float(sink_logits[head]))
            value = np.concatenate([value, np.zeros((1, value.shape[1]))])
        if score.size:
            weight = np.exp(score - score.max())
            output[row, query_index, head] = weight @ value / weight.sum()
            lse[row, query_index, head] = score.max() + np.log(weight.sum())
    return output, lse


class Tokens:
    """Cached tokens [B, K, S, H], and new ones after them."""

    def __init__(self, key, value, new):
        pairs = [(key, value)] if new is None else [(key, value), (new.key, new.value)]
        self.key, self.value = (np.concatenate([np.asarray(p[i], np.float64) for p in pairs], axis=2) for i in (0, 1))
        self.num_kv_heads, self.capacity = key.shape[1], key.shape[2]
        self.allowed = None if new is None else np.asarray(new.allowed)

    def __call__(self, row, head):
        return self.key[row, head], self.value[row, head]

    def new_read(self, row, query_index):
        return [] if self.allowed is None else list(self.capacity + np.flatnonzero(self.allowed[row, query_index]))


def normal(seed, shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tree(batch, num_queries, num_new):
    """Each query attends to itself and some tokens before it; in the second row, to nothing at all."""
    offset = num_new - num_queries
    before = np.tril(np.random.default_rng(7).random((batch, num_queries, num_new)) < 0.5, offset - 1)
    allowed = before | (np.arange(num_new) == offset + np.arange(num_queries)[:, None])
    allowed[1 % batch] &= batch == 1
    return allowed


def new_tokens(num_new, batch, num_queries, num_kv_heads, head_size, value_size, dtype):
    """No query attends to the first new token, which is NaN."""
    if num_new is None:
        return None
    allowed = tree(batch, num_queries, num_new)
    key = normal(3, (batch, num_kv_heads, num_new, head_size), dtype)
    value = normal(4, (batch, num_kv_heads, num_new, value_size), dtype)
    if num_new > num_queries:
        allowed[:, :, 0] = False
        key, value = key.at[:, :, 0].set(jnp.nan), value.at[:, :, 0].set(jnp.nan)
    return NewTokens(key, value, jnp.asarray(allowed))


def assert_equal(result, expected, dtype, value):
    (output, lse), (expected_output, expected_lse) = result, expected
    assert output.dtype == dtype and lse.dtype == F32
    assert output.shape == expected_output.shape and lse.shape == expected_lse.shape
    bound = TOLERANCE[dtype] * np.nanmax(np.abs(np.asarray(value, np.float64)))
    np.testing.assert_allclose(np.asarray(output, np.float64), expected_output, atol=bound, rtol=0)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    is_read = ~np.isneginf(expected_lse)
    np.testing.assert_allclose(np.asarray(lse)[is_read], expected_lse[is_read], atol=LSE_TOLERANCE, rtol=LSE_TOLERANCE)


# T, N, K, S, H, I, lengths, new tokens, dtype; windows end at the row's length, each query's is one token on.
FLASH = {
    # An empty row, a row of one token, a full one; the last tile of 200 slots starts in the one before it.
    "ragged": (3, 6, 2, 200, 64, 64, [1, 200, 0, 130], 5, F32, {}),
    # Windows that leave out tiles, sinks of a tile and a bit, a row whose window holds more than the row.
    "windows": (2, 2, 1, 1000, 80, 48, [1000, 63, 640], None, F32, {"window": 100, "num_sink_tokens": 67}),
    # Two blocks of packed queries (96 of 128), sink logits, a soft-cap, a tree of 24.
    "blocks": (24, 4, 1, 64, 64, 64, [64, 13], 24, BF16, {"softcap": 5.0, "sinks": True}),
    # Two groups of packed queries (68 of 128), two chunks of new tokens, keys and values of different sizes.
    "groups": (17, 8, 2, 72, 192, 128, [72], 70, F16, {"window": 30, "sinks": True}),
    # Eight heads, the largest head; the output is merged in two pieces.
    "large": (1, 8, 8, 128, 256, 256, [100], 1, BF16, {}),
}


def flash_operands(name):
    num_queries, num_heads, num_kv_heads, capacity, head_size, value_size, lengths, num_new, dtype, extra = FLASH[name]
    batch = len(lengths)
    query = normal(0, (batch, num_queries, num_heads, head_size), dtype)
    key = np.asarray(normal(1, (batch, num_kv_heads, capacity, head_size), dtype)).copy()
    value = np.asarray(normal(2, (batch, num_kv_heads, capacity, value_size), dtype)).copy()
    num_sinks, first = extra.get("num_sink_tokens", 0), None
    if "window" in extra:
        first = np.asarray(lengths)[:, None] - extra["window"] + np.arange(num_queries)
    lowest = np.zeros(batch, int) if first is None else first.min(axis=1)
    for row, length in enumerate(lengths):
        slots = np.arange(capacity)
        is_read = (slots < length) & ((slots >= lowest[row]) | (slots < num_sinks))
        key[row, :, ~is_read], value[row, :, ~is_read] = np.nan, np.nan
    new = new_tokens(num_new, batch, num_queries, num_kv_heads, head_size, value_size, dtype)
    operands = (query, jnp.asarray(key), jnp.asarray(value), jnp.asarray(lengths, jnp.int32), new)
    options = {
        "scale": head_size**-0.5,
        "softcap": extra.get("softcap"),
        "first": None if first is None else jnp.asarray(first, jnp.int32),
        "num_sink_tokens": num_sinks,
        "sink_logits": normal(5, (num_heads,), F32) if "sinks" in extra else None,
    }
    return operands, options


def flash_oracle(operands, options):
    query, key, value, length, new = operands
    tokens = Tokens(key, value, new)

    def reads(row, query_index, _):
        slots = np.arange(int(length[row]))
        if options["first"] is not None:
            is_sink = slots < options["num_sink_tokens"]
            slots = slots[(slots >= int(options["first"][row, query_index])) | is_sink]
        return np.asarray([*slots, *tokens.new_read(row, query_index)], int)

    numbers = {name: options[name] for name in ("scale", "softcap", "sink_logits")}
    return attend(query, tokens, reads, **numbers)


def run_flash(operands, options):
    def run(operands, first, sink_logits):
        arrays = {"first": first, "sink_logits": sink_logits}
        return flash_decode(*operands, **{**options, **arrays}, implementation="gpu_interpreted")

    return jax.jit(run)(operands, options["first"], options["sink_logits"])


@pytest.mark.parametrize("name", FLASH)
def test_flash_decode(name, monkeypatch):
    operands, options = flash_operands(name)
    result = run_flash(operands, options)
    assert_equal(result, flash_oracle(operands, options), FLASH[name][8], operands[2])
    if name == "ragged":  # in one run no owner has two partials: the split changes only the order of sums
        monkeypatch.setattr(kernel_gpu, "INTERPRETED_RUNS", 1)
        for whole, split in zip(run_flash(operands, options), result, strict=True):
            np.testing.assert_allclose(whole, split, atol=1e-6, rtol=1e-6)


# T, N, A, Kp, Kt, lengths [B, Kt], new tokens, dtype
PAGED = {
    # Pages of all heads, four to a tile, one table per row; pages of no row are NaN.
    "short": (2, 4, 16, 2, 1, [[0], [1], [100]], 2, F32, {}),
    # Pages of one head, two tiles to a page, a table and a length per head; windows.
    "long": (3, 2, 128, 1, 2, [[5, 128], [300, 0]], None, BF16, {"window": 70, "num_sink_tokens": 3}),
}


@pytest.mark.parametrize("name", PAGED)
def test_paged_decode(name):
    num_queries, num_heads, page_tokens, heads_per_page, num_tables, lengths, num_new, dtype, extra = PAGED[name]
    batch, num_kv_heads, size = len(lengths), max(heads_per_page, num_tables), 64
    lengths = np.asarray(lengths)
    pages_per_table = -(-lengths.max() // page_tokens)
    num_pages = batch * num_tables * pages_per_table + 2
    order = np.random.default_rng(6).permutation(num_pages)
    table = order[: batch * num_tables * pages_per_table].reshape(batch, num_tables, -1).astype(np.int32)
    window, num_sinks, first = extra.get("window"), extra.get("num_sink_tokens", 0), None
    if window is not None:
        first = np.maximum(lengths.max(axis=1)[:, None] - window, 0) + np.arange(num_queries)
    capacity = pages_per_table * page_tokens
    shape = (num_pages, heads_per_page, page_tokens, size)
    pools = [np.full(shape, np.nan, np.asarray(jnp.zeros((), dtype)).dtype) for _ in range(2)]
    cached = [np.asarray(normal(seed, (batch, num_kv_heads, capacity, size), dtype)) for seed in (1, 2)]
    for row, head, slot in np.ndindex(batch, num_kv_heads, capacity):
        length = lengths[row, head % num_tables]
        if slot < length and (first is None or slot >= first[row].min() or slot < num_sinks):
            page = table[row, head % num_tables, slot // page_tokens]
            for pool, rows in zip(pools, cached, strict=True):
                pool[page, head % heads_per_page, slot % page_tokens] = rows[row, head, slot]
    table[np.arange(pages_per_table) * page_tokens >= lengths[..., None]] = 10_000
    query = normal(0, (batch, num_queries, num_heads, size), dtype)
    new = new_tokens(num_new, batch, num_queries, num_kv_heads, size, size, dtype)
    tokens = Tokens(*cached, new)

    def reads(row, query_index, head):
        slots = np.arange(lengths[row, head % num_tables])
        if first is not None:
            slots = slots[(slots >= first[row, query_index]) | (slots < num_sinks)]
        return np.asarray([*slots, *tokens.new_read(row, query_index)], int)

    def run(query, keys, values, table, length, new, first):
        options = {"scale": 0.2, "first": first, "num_sink_tokens": num_sinks, "implementation": "gpu_interpreted"}
        return paged_decode(query, keys, values, table, length, new, **options)

    first_array = None if first is None else jnp.asarray(first, jnp.int32)
    arrays = (*map(jnp.asarray, pools), jnp.asarray(table), jnp.asarray(lengths, jnp.int32))
    result = jax.jit(run)(query, *arrays, new, first_array)
    assert_equal(result, attend(query, tokens, reads, scale=0.2), dtype, cached[1])


# T, N, K, S, H, block_tokens, lists per row and head, lengths, new tokens, dtype
GATHER = {
    # Four pages to a tile; an empty list; the page in which the row ends, and one after it.
    "short": (2, 4, 2, 192, 64, 16, [[[], [11, 0, 4]], [[3, 1, 2, 5, 0], [7]]], [190, 37], 3, F32),
    # Two tiles to a page, in the second of which the row ends.
    "long": (1, 4, 1, 384, 128, 128, [[[2, 0]], [[1]]], [330, 200], None, BF16),
}


@pytest.mark.parametrize("name", GATHER)
def test_gather_decode(name):
    num_queries, num_heads, num_kv_heads, capacity, size, block_tokens, lists, lengths, num_new, dtype = GATHER[name]
    batch, longest = len(lists), max(len(pages) for row in lists for pages in row) + 1
    index = np.full((batch, num_kv_heads, longest), -10_000, np.int32)
    cached = [np.asarray(normal(seed, (batch, num_kv_heads, capacity, size), dtype)) for seed in (1, 2)]
    poisoned = [np.full_like(rows, np.nan) for rows in cached]
    listed = {}
    for row, head in np.ndindex(batch, num_kv_heads):
        pages = lists[row][head]
        index[row, head, : len(pages)] = pages
        slots = np.asarray([page * block_tokens + i for page in pages for i in range(block_tokens)], int)
        listed[row, head] = slots[slots < lengths[row]]
        for target, rows in zip(poisoned, cached, strict=True):
            target[row, head, listed[row, head]] = rows[row, head, listed[row, head]]
    count = np.asarray([[len(pages) for pages in row] for row in lists], np.int32)
    query = normal(0, (batch, num_queries, num_heads, size), dtype)
    new = new_tokens(num_new, batch, num_queries, num_kv_heads, size, size, dtype)
    tokens = Tokens(*cached, new)

    def reads(row, query_index, head):
        return np.asarray([*listed[row, head], *tokens.new_read(row, query_index)], int)

    def run(*operands):
        return gather_decode(*operands, block_tokens=block_tokens, scale=0.2, implementation="gpu_interpreted")

    arrays = (*map(jnp.asarray, (*poisoned, index, count)), jnp.asarray(lengths, jnp.int32))
    result = jax.jit(run)(query, *arrays, new)
    assert_equal(result, attend(query, tokens, reads, scale=0.2), dtype, cached[1])


def test_tiles_outside_a_window_are_not_counted():
    """Of 1,000 tokens, sinks 0 .. 1 and the window from 700 on: the tiles that start at 0 and at 640, 704, ..., 936."""
    length, first = (
        jnp.asarray([[1000], [50], [0]], jnp.int32),
        jnp.asarray([[700, 701], [700, 701], [0, 1]], jnp.int32),
    )
    tables, num_tiles = ordered(length, first, 2)
    assert num_tiles.tolist() == [[7], [1], [0]]
    tiles = OrderedTiles(2, True, 1000)
    starts = [int(tiles.position(tables, jnp.int32(0), jnp.int32(tile))) for tile in range(7)]
    assert starts == [0, 640, 704, 768, 832, 896, 936]
    assert [bool(tiles.is_unmasked(tables, jnp.int32(0), jnp.int32(tile))) for tile in (0, 1, 2, 6)] == [
        False,
        False,
        True,
        False,
    ]


SHAPES = {
    "flash_decode": (flash_decode, flash_shapes.SHAPES),
    "paged_decode": (paged_decode, paged_shapes.SHAPES),
    "gather_decode": (gather_decode, gather_shapes.SHAPES),
}


@pytest.mark.parametrize("kernel", SHAPES)
def test_lowers_for_cuda(kernel):
    """Both kernels are in the program, and nothing else as large as the cache."""
    function, shapes = SHAPES[kernel]
    shape = next(iter(shapes.values()))
    operands, options = shape.operands(), shape.options()

    def run(operands):
        return function(**operands, **options, implementation="gpu")

    text = export.export(jax.jit(run), platforms=["cuda"])(operands).mlir_module()
    assert text.count("@mosaic_gpu_v2") == 2
    largest = max(leaf.size for leaf in jax.tree.leaves(operands))
    for equation in equations(jax.make_jaxpr(run)(operands).jaxpr):
        if equation.primitive.name != "reshape":
            assert all(out.aval.size < largest for out in equation.outvars), equation.primitive


def equations(jaxpr):
    """All that a program does outside its kernels."""
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr") if equation.primitive.name in ("jit", "pjit") else None
        yield from [equation] if inner is None else equations(inner.jaxpr)


def described(shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_unsupported_operands_run_on_xla_with_the_reason(monkeypatch):
    monkeypatch.setattr(selection, "backend_of_this_device", lambda: ("gpu", "the device is a Hopper GPU"))
    query = described((2, 1, 8, 64))

    def flash(query=query, capacity=128, size=64, dtype=BF16):
        return select_flash_decode(query, *[described((2, 2, capacity, size), dtype)] * 2)

    assert flash().implementation == "gpu"
    reasons = {
        "there are 100": flash(capacity=100),
        "there are 56": flash(capacity=56),
        "head size of keys must be a multiple of 16 in 32..256, it is 72": flash(described((2, 1, 8, 72)), size=72),
        "these are bfloat16, float32": flash(dtype=F32),
        "must all be bfloat16 or all float16, these are float32": flash(described((2, 1, 8, 64), F32), dtype=F32),
    }
    pages, table = described((9, 2, 24, 64)), described((2, 1, 4), jnp.int32)
    reasons["these have 24"] = select_paged_decode(query, pages, pages, table)
    cache, lists = described((2, 2, 128, 64)), described((2, 2, 4), jnp.int32)
    reasons["these have 1: a bulk copy"] = select_gather_decode(query, cache, cache, lists, block_tokens=1)
    for reason, chosen in reasons.items():
        assert chosen.implementation == "xla" and reason in chosen.reason
    with pytest.raises(NotImplementedError, match=r"slots .* there are 100"):
        cache = jnp.zeros((2, 2, 100, 64), BF16)
        flash_decode(jnp.zeros((2, 1, 8, 64), BF16), cache, cache, jnp.zeros(2, int), scale=1.0, implementation="gpu")
