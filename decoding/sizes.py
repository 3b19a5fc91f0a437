"""Rounds buffer sizes to a few values, so that compiled code is reused, and checks them against free memory."""

import math
import os

import jax
from jax.typing import DTypeLike

from decodax.layers.execution import Execution
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.models.model import Model

SMALLEST_BUCKET = 16


def bucket(size: int) -> int:
    """The smallest of 16, 20, 24, 28, 32, 40, 48, 56, 64, ... (four per doubling) that is at least `size`.

    >>> [bucket(n) for n in (1, 16, 17, 33, 100, 1000)]
    [16, 16, 20, 40, 112, 1024]
    """
    if size <= SMALLEST_BUCKET:
        return SMALLEST_BUCKET
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step


def cache_capacity(num_tokens: int, execution: Execution) -> int:
    """Capacity in tokens of a cache that must hold `num_tokens`: bucketed, and a multiple that the kernels need."""
    multiple = execution.cache_multiple
    return -(-bucket(num_tokens) // multiple) * multiple


def chunk_tokens(num_tokens: int, most_per_device: int, execution: Execution) -> int:
    """Tokens of the next chunk of a prompt of which `num_tokens` are left: bucketed, at most `most_per_device` each.

    Where tokens are sharded, every device has the same number, in two blocks (`sharding/ring.py`).
    """
    num_shards = execution.num_shards("T")
    chunk = min(bucket(num_tokens), most_per_device * num_shards)
    multiple = 1 if num_shards == 1 else 2 * num_shards
    return -(-chunk // multiple) * multiple


def cache_bytes(model: Model, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache) -> int:
    """Bytes of an empty cache, without making it; over a mesh, those in the memory of one device.

    The devices of a CPU share one memory.
    """
    shapes = jax.eval_shape(lambda: model.empty_cache(batch_size, capacity, dtype, policy))
    mesh = model.execution.mesh
    if mesh is None:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    sharded = zip(jax.tree.leaves(shapes), jax.tree.leaves(model.execution.shardings(shapes)), strict=True)
    of_one = sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in sharded)
    local = mesh.local_devices
    return of_one * (len(local) if local and local[0].platform == "cpu" else 1)


def free_bytes() -> int | None:
    """Free memory of the default device; None where the platform does not report it."""
    device = jax.local_devices()[0]  # a process cannot query another one's device
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if device.platform == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return _available_host_bytes()
    return None


def _available_host_bytes() -> int | None:
    """What Linux reports as available without swapping, else the free pages."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_step_fits(model: Model, batch_size: int, num_tokens: int, num_arrays: int) -> None:
    """Raises MemoryError, with what to do, when the logits of a decoding step are larger than the free memory.

    num_tokens: of the step: the nodes of a draft.
    num_arrays: float32 [B, C, V] that the step makes, C being these tokens.
    """
    vocab_size, execution = model.vocab_size, model.execution
    num_shards = execution.num_shards("B", batch_size) * execution.num_shards("V", vocab_size)
    needed, free = 4 * num_arrays * batch_size * num_tokens * vocab_size // num_shards, free_bytes()
    if free is not None and needed > free:
        raise MemoryError(
            f"a step over {num_tokens} tokens in each of {batch_size} rows makes {num_arrays} arrays of logits "
            f"[{batch_size}, {num_tokens}, {vocab_size}], {needed:,} bytes, and {free:,} are free: "
            f"{'lower draft_tokens, or split the batch' if num_tokens > 1 else 'split the batch'}"
        )


def check_cache_fits(
    model: Model,
    batch_size: int,
    capacity: int,
    dtype: DTypeLike,
    policy: CachePolicy = KVCache,
    *,
    remedy: str | None = None,
) -> None:
    """Raises MemoryError, with what would fit, when a cache of this size is larger than the free memory.

    remedy: what the error says to do, where it is not a generation's cache.
    """
    needed, free = cache_bytes(model, batch_size, capacity, dtype, policy), free_bytes()
    if free is None or needed <= free:
        return
    # A recurrent state has one size whatever the tokens, so only what grows with them can be saved by fewer.
    of_one_token = cache_bytes(model, batch_size, 1, dtype, policy)
    per_token = (needed - of_one_token) // max(capacity - 1, 1)
    num_tokens = 1 + (free - of_one_token) // per_token if per_token else 0
    shorter = f"{num_tokens:,} tokens (prompt and output) in each of {batch_size} rows, or " if num_tokens > 0 else ""
    remedy = remedy or ("lower max_new_tokens, shorten or split the batch" if shorter else "split the batch")
    raise MemoryError(
        f"the cache for {batch_size} rows of {capacity} tokens needs {needed:,} bytes, and {free:,} are free. "
        f"That holds {shorter}{free * batch_size // needed:,} rows of {capacity}: {remedy}."
    )
