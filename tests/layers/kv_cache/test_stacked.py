"""A stack of caches is split over the pipeline, and a shard of its rows is read and written in place."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from decodax.layers.attention.attend_xla import attend_in_xla
from decodax.layers.attention.mask import Causal
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.latent import LatentCache
from decodax.layers.kv_cache.micro_batch import MicroBatch, MicroBatchCache, micro_batch_cache
from decodax.layers.kv_cache.stacked import Stacked
from decodax.sharding.constraints import shardings
from decodax.sharding.mesh import read_mesh
from decodax.sharding.rules import RULES

BATCH, CAPACITY = 4, 11


def stack(trees):
    return Stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))


def test_layers_of_a_stack_are_split_over_the_pipeline():
    mesh = read_mesh("pipeline=2,data=2,tensor=2")
    stacked = stack([KVCache.empty(BATCH, 2, CAPACITY, 8, jnp.float32)] * 4)
    found = shardings((stacked,), mesh, RULES)[0].each
    assert found.key.spec == found.value.spec == PartitionSpec("pipeline", "data", "tensor", None, None)
    assert found.length.spec == PartitionSpec("pipeline", "data")


def test_a_shard_reads_latents_of_its_rows():
    """Two shards of two groups: the second shard holds the second row of each group, rows 1 and 3."""
    random = np.random.default_rng(0)
    latent, rope_key = (random.standard_normal((2, BATCH, CAPACITY, size)).astype(np.float32) for size in (5, 2))
    layers = ((latent[layer], rope_key[layer], np.arange(4, dtype=np.int32) + 1 + 4 * layer) for layer in range(2))
    each = stack([LatentCache(*map(jnp.asarray, arrays)) for arrays in layers]).each
    rows = MicroBatch(jnp.int32(1), count=2, groups=2)
    shard = micro_batch_cache(each, jnp.int32(1), rows, in_place=True)
    assert isinstance(shard, MicroBatchCache) and shard.capacity == CAPACITY and shard.length.tolist() == [6, 8]
    got = shard.read_latents(jnp.int32(2), 5)
    np.testing.assert_array_equal(got[0], latent[1, [1, 3], 2:7])
    np.testing.assert_array_equal(got[1], rope_key[1, [1, 3], 2:7])
    np.testing.assert_array_equal(got[2], np.arange(2, 7)[None])
    np.testing.assert_array_equal(got[3], np.arange(2, 7) < np.array([[6], [8]]))


def test_the_shard_of_all_rows_is_the_cache_itself():
    """So that a kernel reads it in place."""
    each = stack([KVCache.empty(BATCH, 2, CAPACITY, 8, jnp.float32)]).each
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
