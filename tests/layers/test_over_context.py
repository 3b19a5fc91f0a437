"""Attention over a context axis is attention on one device, whatever is split: slots, tokens, rows, heads."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.partial_softmax import merge_stack
from decodax.layers.attention.attend import IMPLEMENTATIONS, attend
from decodax.layers.attention.attend_absorbed import attend_absorbed
from decodax.layers.attention.attend_expanded import attend_expanded
from decodax.layers.attention.attend_over_devices import ON_ONE_DEVICE
from decodax.layers.attention.attend_xla import attend_in_xla
from decodax.layers.attention.expansion import Expansion
from decodax.layers.attention.implementations import attention_by, select_implementation
from decodax.layers.attention.mask import Ancestors, Causal, Window
from decodax.layers.attention.over_context import OwnSlots
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache.full import KVCache, KVUpdate
from decodax.layers.kv_cache.latent import LatentCache, LatentUpdate
from decodax.layers.kv_cache.staged import Staged
from decodax.layers.kv_cache.view import committed
from decodax.sharding.context_algorithm import select_context_algorithm
from decodax.sharding.mesh import read_mesh
from tests.sharding.collectives import collectives, count

BATCH, HEADS, KV_HEADS, SIZE, CAPACITY = 2, 8, 2, 5, 320
LENGTHS = np.array([37, 130], np.int32)  # of one device's slots of eight, and of four devices'
TREE = Ancestors.from_parents(jnp.array([[-1, 0, 0, 2, 1]]))
STAGED = Ancestors(jnp.array([[[1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]], bool))
# float32 sums of at most 210 weighted values of size about 1, in at most 17 parts.
TOLERANCE = 5e-6
COMBINED = "data=2,context=2,tensor=2"
OPTIONS = {"scale": 0.3, "softcap": None}

# Queries, keys and values together, results, and log-sum-exps; and those two of what the cache's parts gave.
ULYSSES, SHORT_RING, AND_CACHE = (
    Counter({"all-to-all": 3}),
    Counter({"collective-permute": 4}),
    Counter({"all-gather": 1, "all-to-all": 2}),
)
CASES = {  # new tokens, staged ones, mask, soft-cap, marked cache, what is split, collectives behind a cache of 8 parts
    "one token": (1, 0, Causal(), None, False, "slots", {"all-reduce": 2}),
    "chain": (5, 0, Causal() & Window(100), 2.0, True, "slots", {"all-reduce": 2}),
    "tree": (5, 0, Causal() & TREE, None, False, "slots", {"all-reduce": 2}),
    "staged": (2, 3, Causal() & STAGED, None, False, "slots", {"all-reduce": 2}),
    "chunk": (80, 0, Causal(), 2.0, True, "tokens", ULYSSES + AND_CACHE),
    "chunk with a window": (80, 0, Causal() & Window(13), None, False, "tokens", SHORT_RING + AND_CACHE),
    "chunk that does not divide": (77, 0, Causal(), None, False, "slots", {"all-reduce": 2}),
}  # fmt: skip

QUICK = {("chain", "context=8"), ("tree", COMBINED), ("chunk", "context=8"), ("chunk with a window", COMBINED)}


def operands(name, *, size=SIZE, capacity=CAPACITY):
    num_new, num_staged, *_, marked, _, _ = CASES[name]
    random = np.random.default_rng(num_new)
    draw = lambda *shape: jnp.asarray(random.standard_normal((BATCH, *shape)), jnp.float32)
    query, key, value = draw(num_new, HEADS, size), draw(KV_HEADS, num_new, size), draw(KV_HEADS, num_new, size)
    kept = jnp.asarray(random.random((BATCH, KV_HEADS, capacity)) < 0.7) if marked else None
    cache = KVCache(draw(KV_HEADS, capacity, size), draw(KV_HEADS, capacity, size), jnp.asarray(LENGTHS), kept)
    if num_staged:
        position = jnp.asarray(LENGTHS[:, None] + np.arange(num_staged, dtype=np.int32))
        cache = Staged(cache, KVUpdate(draw(KV_HEADS, num_staged, size), draw(KV_HEADS, num_staged, size)), position)
    position = jnp.asarray(LENGTHS[:, None] + num_staged + np.arange(num_new, dtype=np.int32))
    return query, key, value, position, cache


def over(mesh, **options):
    num_devices = np.prod([int(part.split("=")[1]) for part in mesh.split(",")])
    return Execution(mesh=read_mesh(mesh, jax.devices()[:num_devices]), **options)


def on_one_device(*operands, **options):
    return jax.jit(lambda *operands: attend_in_xla(*operands, **options)[0])(*operands)


# Each takes seconds to compile; the quick ones have a window, marks, a tree and both ways of splitting between them.
MESHES_OF_CASES = [
    pytest.param(name, mesh, marks=() if (name, mesh) in QUICK else pytest.mark.slow)
    for name in CASES
    for mesh in ("context=8", COMBINED)
]


@pytest.mark.parametrize(("name", "mesh"), MESHES_OF_CASES)
def test_equals_one_device(name, mesh):
    num_new, _, mask, softcap, _, split, moved = CASES[name]
    *arrays, cache = operands(name)
    execution = over(mesh)
    if mesh == "context=8":
        assert select_implementation(IMPLEMENTATIONS, (*arrays, mask, cache), execution) == f"split {split}"
    options = {"scale": 0.3, "softcap": softcap}
    attention = jax.jit(lambda *operands: attend(*operands, execution=execution, **options)[0])
    want = on_one_device(*arrays, mask, cache, **options)
    compiled = attention.lower(*arrays, mask, execution.constrained(cache)).compile()
    np.testing.assert_allclose(compiled(*arrays, mask, execution.constrained(cache)), want, atol=TOLERANCE)
    if mesh == "context=8":
        assert count(compiled) == moved
        sent = max(collective.num_bytes for collective in collectives(compiled))
        assert sent <= 4 * BATCH * num_new * HEADS * (SIZE + 1)  # whatever the cache has room for


@pytest.mark.parametrize("way", ["ring", "ulysses"])
@pytest.mark.parametrize("mesh", ["context=8", "context=2,tensor=4"])
def test_a_whole_text(mesh, way):
    """Without a cache, and by the way that is asked for: a ring that only permutes, and only all-to-alls."""
    *arrays, _ = operands("chunk")
    execution = over(mesh, context=way)
    attention = jax.jit(lambda *arrays: attend(*arrays, Causal(), None, execution=execution, **OPTIONS)[0])
    if mesh == "context=2,tensor=4":  # two key-value heads cannot be dealt to four devices: left to XLA
        assert select_implementation(IMPLEMENTATIONS, (*arrays, Causal(), None), execution) == "xla"
    else:
        kinds = set(count(attention.lower(*arrays).compile()))
        assert kinds == {"collective-permute" if way == "ring" else "all-to-all"}
    want = on_one_device(*arrays, Causal(), None, **OPTIONS)
    np.testing.assert_allclose(attention(*arrays), want, atol=TOLERANCE)


def test_the_way_that_sends_less():
    """Numbers that a device sends for each of its tokens, by hand: 8 devices, 16 heads on 4, of 10 numbers each."""
    sizes = {"num_tokens": 64, "num_devices": 8, "query_size": 10, "kv_size": 20, "result_size": 10, "window": None}
    # Ring: 7 x 80 + 160 + 80 + 160 = 960. Ulysses: (160 + 2 x 80 + 160) 7 / 8 = 420.
    assert select_context_algorithm(None, num_heads=16, num_kv_heads=4, **sizes) == "ulysses"
    # Two steps of a ring: 1 x 80.
    assert select_context_algorithm(None, num_heads=16, num_kv_heads=4, **sizes | {"window": 65}) == "ring"
    # Twelve heads do not divide.
    assert select_context_algorithm(None, num_heads=12, num_kv_heads=4, **sizes) == "ring"
    assert select_context_algorithm("ring", num_heads=16, num_kv_heads=4, **sizes) == "ring"
    with pytest.raises(ValueError, match="context must be one of ring, ulysses or None, got 'star'"):
        select_context_algorithm("star", num_heads=16, num_kv_heads=4, **sizes)


RANK, NOPE, ROPE, VALUE = 7, 3, 2, 4


def latent_operands(num_new, num_staged=0):
    random = np.random.default_rng(num_new)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    rows = lambda count: LatentUpdate(draw(BATCH, count, RANK), draw(BATCH, count, ROPE))
    expand = Expansion(draw(HEADS * NOPE, RANK), draw(HEADS * VALUE, RANK), HEADS)
    cache = LatentCache(draw(BATCH, CAPACITY, RANK), draw(BATCH, CAPACITY, ROPE), jnp.asarray(LENGTHS))
    if num_staged:
        position = jnp.asarray(LENGTHS[:, None] + np.arange(num_staged, dtype=np.int32))
        cache = Staged(cache, rows(num_staged), position)
    position = jnp.asarray(LENGTHS[:, None] + num_staged + np.arange(num_new, dtype=np.int32))
    return draw, rows(num_new), expand, position, cache


@pytest.mark.parametrize(("name", "mesh"), [("tree", "context=8"), ("staged", COMBINED)])
def test_latents_absorbed(name, mesh):
    num_new, num_staged, mask, *_ = CASES[name]
    draw, rows, _, position, cache = latent_operands(num_new, num_staged)
    queries = draw(BATCH, num_new, HEADS, RANK), draw(BATCH, num_new, HEADS, ROPE)

    def attention(execution, cache):
        return jax.jit(lambda *arrays: attend_absorbed(*arrays, mask, cache, scale=0.3, execution=execution))(
            *queries, rows, position
        )

    execution = over(mesh)
    got, want = attention(execution, execution.constrained(cache)), attention(ON_THIS_DEVICE, cache)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "mesh", "way"),
    [
        ("chunk", "context=8", "ring"),
        pytest.param("chunk", "context=8", "ulysses", marks=pytest.mark.slow),
        ("chunk", COMBINED, "ulysses"),
        pytest.param("chunk with a window", "context=8", None, marks=pytest.mark.slow),
        pytest.param("chunk that does not divide", "context=8", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.quick_cases(1)
def test_latents_expanded(name, mesh, way):
    """Latents are sent, R + H numbers for a token, and not the keys and values of all heads."""
    num_new, _, mask, *_ = CASES[name]
    draw, rows, expand, position, cache = latent_operands(num_new)
    query = draw(BATCH, num_new, HEADS, NOPE + ROPE)

    def attention(execution):
        return jax.jit(
            lambda query, rows, expand, position, cache: attend_expanded(
                query, rows, expand, position, mask, cache, scale=0.3, execution=execution
            )
        )

    execution = over(mesh, context=way)
    for seen in (cache, None):
        arguments = query, rows, expand, position, seen if seen is None else execution.constrained(seen)
        want = attention(ON_THIS_DEVICE)(query, rows, expand, position, seen)
        np.testing.assert_allclose(attention(execution)(*arguments), want, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["chain", "tree", "staged"])
@pytest.mark.slow
def test_kernels_on_each_device(name):
    """Those of a TPU, interpreted, device by device: some have no token in their slots, and NaN where nothing stands.

    Not on a mesh: an interpreted kernel calls the host, which devices that wait for each other keep busy.
    """
    _, _, mask, softcap, *_ = CASES[name]
    *arrays, cache = operands(name, size=128, capacity=1024)
    bare = dataclasses.replace(committed(cache), kept=None)
    empty = jnp.arange(1024)[None, None, :, None] >= bare.length[:, None, None, None]
    behind = lambda bare: dataclasses.replace(cache, cache=bare) if isinstance(cache, Staged) else bare
    options, parts = {"scale": 0.05, "softcap": softcap}, []
    for device in range(4):
        first, slots = jnp.int32(256 * device), slice(256 * device, 256 * device + 256)
        buffers = (jnp.where(empty, jnp.nan, buffer)[:, :, slots] for buffer in (bare.key, bare.value))
        own = behind(KVCache(*buffers, bare.length).shard(first))
        seen = OwnSlots(mask, first, jnp.bool_(device == 0))
        operands_here = (*arrays, seen, own)
        attention = attention_by(ON_ONE_DEVICE, operands_here, Execution("tpu_interpreted"), **options)
        parts.append(attention(*operands_here))
    got = merge_stack(*(jnp.stack(part, axis=1) for part in zip(*parts, strict=True))).output
    want = on_one_device(*arrays, mask, behind(bare), **options)
    np.testing.assert_allclose(got, want, atol=3 * TOLERANCE)


def test_what_cannot_be_split_is_left_to_the_compiler():
    """A cache whose capacity does not divide, and one that says nothing of parts: right all the same."""

    *arrays, cache = operands("chain")
    execution = over("context=8")
    odd = KVCache(*(buffer[:, :, :317] for buffer in (cache.key, cache.value)), cache.length)
    assert select_implementation(IMPLEMENTATIONS, (*arrays, Causal(), odd), execution) == "xla"
    got = jax.jit(lambda *arrays: attend(*arrays, Causal(), odd, execution=execution, **OPTIONS)[0])(*arrays)
    np.testing.assert_allclose(got, on_one_device(*arrays, Causal(), odd, **OPTIONS), atol=TOLERANCE)


def test_broken_tokens_reach_only_their_readers():
    query, key, value, position, cache = operands("tree")
    mask = CASES["tree"][2]  # node 1 has no readers but itself and node 4
    execution = over("context=8")
    attention = jax.jit(
        lambda value: attend(
            query, key, value, position, mask, execution.constrained(cache), execution=execution, **OPTIONS
        )[0]
    )
    sound, got = attention(value), attention(value.at[:, :, 1].set(jnp.nan))
    nonfinite = np.isnan(got).any(axis=(0, 2, 3))
    np.testing.assert_array_equal(nonfinite, [False, True, False, False, True])
    np.testing.assert_array_equal(got[:, ~nonfinite], sound[:, ~nonfinite])
