"""Stacked caches act as their caches one by one, and a shard of a stack reads as those rows of its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from decodax.layers.attention.attend_xla import attend_in_xla
from decodax.layers.attention.mask import Causal
from decodax.layers.kv_cache.full import KVCache, MarkedCache
from decodax.layers.kv_cache.micro_batch import MicroBatch, MicroBatchCache, micro_batch_cache
from decodax.layers.kv_cache.stacked import Stacked
from decodax.layers.mixers.cca import CCAConfig
from decodax.layers.rope import Rope
from decodax.sharding.constraints import shardings
from decodax.sharding.mesh import read_mesh
from decodax.sharding.rules import RULES
from tests.model_kinds import DELTA, FULL, LATENT, LINEAR

LAYERS, BATCH, CAPACITY, TOKENS = 2, 4, 11, 5
CONVOLVED = CCAConfig(4, 2, 8, Rope(4, 100.0), 0.4)
MIXERS = {"full": FULL, "latent": LATENT, "delta": DELTA, "linear": LINEAR, "tailed": CONVOLVED}
CASES = [("full", MarkedCache), *((name, KVCache) for name in MIXERS)]


def random_like(tree, random):
    def draw(leaf):
        return leaf if leaf.dtype == jnp.int32 else jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, tree)


def filled(name, policy, seed):
    """A cache with 1, 2, 3 and 4 tokens in its rows, and the next cache update."""
    random = np.random.default_rng(seed)
    cache = MIXERS[name].empty_cache(BATCH, CAPACITY, jnp.float32, policy)
    rows = [random_like(MIXERS[name].empty_update(BATCH, TOKENS, jnp.float32), random) for _ in range(2)]
    return cache.commit(rows[0], jnp.arange(1, BATCH + 1, dtype=jnp.int32)), rows[1]


def stack(trees):
    return Stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)  # sums of a few numbers of about 1, in another order


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_commit(name, policy):
    caches, rows = zip(*(filled(name, policy, seed) for seed in range(LAYERS)), strict=True)
    count = jnp.array([2, 0, 3, 1], jnp.int32)
    path = jnp.array([[0, 2, 4], [0, 1, 2], [0, 3, 4], [1, 2, 3]], jnp.int32)
    stacked = stack(caches)
    assert stacked.capacity == CAPACITY and stacked.length.tolist() == [1, 2, 3, 4]
    for chosen in (None, path):
        wanted = stack([cache.commit(new, count, chosen) for cache, new in zip(caches, rows, strict=True)])
        assert_same(stacked.commit(stack(rows), count, chosen), wanted)


@pytest.mark.parametrize("name", MIXERS)
def test_place(name):
    staged, new = zip(*(filled(name, KVCache, seed)[1:] * 2 for seed in range(LAYERS)), strict=True)
    slot = jnp.array([3, 1, 9, 0, 2], jnp.int32)
    wanted = stack([one.place(fresh, slot) for one, fresh in zip(staged, new, strict=True)])
    assert_same(stack(staged).place(stack(new), slot), wanted)


def test_marks_are_those_of_the_caches():
    assert stack([filled("full", MarkedCache, 0)[0]]).marks_tokens
    assert not stack([filled("full", KVCache, 0)[0]]).marks_tokens
    assert not stack([filled("tailed", KVCache, 0)[0]]).marks_tokens


def test_layers_of_a_stack_are_split_over_the_pipeline():
    mesh = read_mesh("pipeline=2,data=2,tensor=2")
    stacked = stack([KVCache.empty(BATCH, 2, CAPACITY, 8, jnp.float32)] * 4)
    found = shardings((stacked,), mesh, RULES)[0].each
    assert found.key.spec == found.value.spec == PartitionSpec("pipeline", "data", "tensor", None, None)
    assert found.length.spec == PartitionSpec("pipeline", "data")


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("name", "policy"), CASES)
def test_a_shard_reads_its_rows_of_its_layer(name, policy, in_place):
    """Two shards of two groups: the second shard holds the second row of each group, rows 1 and 3."""
    caches = [filled(name, policy, seed)[0] for seed in range(LAYERS)]
    wanted = jax.tree.map(lambda leaf: leaf[jnp.array([1, 3])], caches[1])
    shard = micro_batch_cache(
        stack(caches).each, jnp.int32(1), MicroBatch(jnp.int32(1), count=2, groups=2), in_place=in_place
    )
    if name == "tailed":
        np.testing.assert_array_equal(shard.tail, wanted.tail)
        shard, wanted = shard.kv, wanted.kv
    if name in ("delta", "linear") or not in_place:
        assert_same(shard, wanted)
        return
    assert isinstance(shard, MicroBatchCache)
    assert shard.capacity == CAPACITY and shard.length.tolist() == wanted.length.tolist() == [2, 4]
    reads = ["read", "read_latents"] if name == "latent" else ["read"]
    for read in reads:
        for got, row in zip(getattr(shard, read)(jnp.int32(2), 7), getattr(wanted, read)(jnp.int32(2), 7), strict=True):
            np.testing.assert_array_equal(got, row)
    with pytest.raises(TypeError, match="commit to the cache of all rows"):
        shard.commit(None, jnp.zeros(2, jnp.int32))


def test_the_shard_of_all_rows_is_the_cache_itself():
    """So that a kernel reads it in place."""
    each = stack([filled("full", KVCache, 0)[0]]).each
    cache = micro_batch_cache(each, jnp.int32(0), MicroBatch(jnp.int32(0), count=1, groups=2), in_place=True)
    assert type(cache) is KVCache


def test_rows_are_written_back_to_their_places():
    """Against NumPy: shard i of each group's rows, in one of two arrays."""
    arrays = np.arange(2 * 12 * 3).reshape(2, 12, 3)
    for index in range(3):
        rows = MicroBatch(jnp.int32(index), count=3, groups=2)
        mine = [0 + 2 * index, 1 + 2 * index, 6 + 2 * index, 7 + 2 * index]
        np.testing.assert_array_equal(rows.cut(jnp.asarray(arrays[0])), arrays[0][mine])
        new = -np.ones((4, 3), int)
        for is_written in (True, False):
            wanted = arrays.copy()
            if is_written:
                wanted[1, mine] = new
            got = rows.put_at(jnp.int32(1), jnp.asarray(arrays), jnp.asarray(new), jnp.bool_(is_written))
            np.testing.assert_array_equal(got, wanted)
            got = rows.put(jnp.asarray(arrays[1]), jnp.asarray(new), jnp.bool_(is_written))
            np.testing.assert_array_equal(got, wanted[1])


def test_a_shard_is_not_copied_out_of_the_cache():
    """Attention over a quarter of the rows allocates nothing as large as their keys, unless they are cut out first."""
    batch, heads, capacity, size = 8, 3, 2048, 16
    stacked = jax.eval_shape(lambda: stack([KVCache.empty(batch, heads, capacity, size, jnp.float32)] * 2).each)
    query, new = jax.ShapeDtypeStruct((2, 1, 6, size), "float32"), jax.ShapeDtypeStruct((2, heads, 1, size), "float32")
    position, index = jax.ShapeDtypeStruct((2, 1), "int32"), jax.ShapeDtypeStruct((), "int32")

    def temporary_bytes(in_place):
        def run(stacked, layer, index, query, key, position):
            shard = micro_batch_cache(stacked, layer, MicroBatch(index, 4, 1), in_place=in_place)
            # Block by block: for few queries the whole filled cache is read at once, which copies it.
            options = {"scale": 0.3, "softcap": None, "block_tokens": 256}
            return attend_in_xla(query, key, key, position, Causal(), shard, **options)

        compiled = jax.jit(run).lower(stacked, index, index, query, new, position).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    shard_bytes = 2 * heads * capacity * size * 4
    assert temporary_bytes(in_place=True) < shard_bytes / 2 < 2 * shard_bytes < temporary_bytes(in_place=False)
