"""Latent attention on keys and values made from the latents: for prompts, where the latents are read by many tokens.

For every head the key of a token is [W_uk c; rope key] and its value W_uv c (DeepSeek-V2, arXiv 2405.04434). A pair of
a query and a token then costs I + H + J numbers per head (the sizes of a query without and with position, and of a
value) and not the 2 R + H of attention on the latents; making the keys and values of a token costs R (I + J).

Keys and values of cached tokens are made block by block and never kept: a whole cache of them would be larger than the
one that latent attention saves, 40,960 numbers a token and not 576 in DeepSeek-V3.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.kernels_pallas.choice import Choice, choose
from decodax.kernels_pallas.flash_prefill import choose_flash_prefill, flash_prefill
from decodax.kernels_pallas.padding import padded
from decodax.layers import pytree
from decodax.layers.attention.attend_absorbed import attend_in_blocks
from decodax.layers.attention.gradients import with_gradients_of
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.full import KVRows
from decodax.layers.kv_cache.latent import LatentCache, LatentRows
from decodax.layers.kv_cache.part import Part
from decodax.layers.kv_cache.staged import Staged, num_staged, unstaged
from decodax.layers.linear import linear

BLOCK_TOKENS = (1024, 512, 256, 128)  # of a cache, for the kernel: the first that divides it


@pytree.dataclass
class Expansion:
    """W_uk and W_uv of N heads, one below the other; `num_heads` says how many those of this device are."""

    key_up: Float[Array, "NI R"]
    value_up: Float[Array, "NJ R"]
    num_heads: int = pytree.static()

    def __call__(
        self, latent: Float[Array, "B S R"], rope_key: Float[Array, "B S H"]
    ) -> tuple[Float[Array, "B N S I_plus_H"], Float[Array, "B N S J"]]:
        """Keys and values of all heads."""

        def heads(weight: Array) -> Array:
            flat = linear(latent, weight)
            return jnp.moveaxis(flat.reshape(*latent.shape[:2], self.num_heads, -1), 2, 1)

        shared = jnp.broadcast_to(rope_key[:, None], (latent.shape[0], self.num_heads, *rope_key.shape[1:]))
        return jnp.concatenate([heads(self.key_up), shared], axis=3), heads(self.value_up)


@pytree.dataclass
class ExpandedCache:
    """Reads a cache of latents as the keys and values of all heads. Values are padded with zeros to the keys' size."""

    latents: LatentCache | Part
    expand: Expansion

    @property
    def length(self) -> Int[Array, " B"]:
        return self.latents.length

    @property
    def capacity(self) -> int:
        return self.latents.capacity

    def read(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B N S H"], Float[Array, "B N S H"], Int[Array, "1 S"], Bool[Array, "B 1 S"]]:
        latent, rope_key, position, filled = self.latents.read_latents(start, num_tokens)
        dtype = self.expand.key_up.dtype
        key, value = _of_one_size(*self.expand(latent.astype(dtype), rope_key.astype(dtype)))
        return key, value, position, filled[:, None]

    def commit(self, rows: Any, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None) -> "ExpandedCache":
        raise TypeError("keys and values that are made from latents are not written: commit to the cache of latents")


def attend_expanded(
    query: Float[Array, "B T N I_plus_H"],
    rows: LatentRows,
    expand: Expansion,
    position: Int[Array, "B T"],
    mask: Mask,
    cache: LatentCache | Part | Staged | None,
    *,
    scale: float,
    execution: Execution,
) -> Float[Array, "B T N J"]:
    """Each query's mixture of the values of the tokens it may read, cached and new (`rows`); it must read itself.

    query: per head without position, then with. Tokens staged with the cache are new ones that stand before these.

    Raises NotImplementedError if `execution` asks for a kernel that does not take these operands.
    """
    value_size = expand.value_up.shape[0] // expand.num_heads
    choice = choose_expanded(query, value_size, mask, cache, execution)
    in_xla = partial(_in_xla, scale=scale)
    operands = (query, rows, expand, position, mask, cache)
    if choice.backend == "xla":
        return in_xla(*operands)
    in_kernels = partial(_in_kernels, scale=scale, choice=choice, execution=execution)
    return with_gradients_of(in_xla, in_kernels)(*operands)


def choose_expanded(query: Any, value_size: int, mask: Mask, cache: Any, execution: Execution) -> Choice:
    """What `attend_expanded` runs for its operands (arrays or their shapes), and why.

    Raises NotImplementedError if `execution` asks for a kernel that does not take them.
    """
    asked = execution.implementation
    choice = choose("flash_prefill", asked, lambda backend: _misfit(query, mask, cache, execution))
    if choice.backend == "xla":
        return choice
    batch, num_queries, num_heads, size = query.shape
    num_heads //= execution.num_parts("N")
    sources = [num_queries] if cache is None else [num_queries, _block_tokens(cache.capacity)]
    queries = jax.ShapeDtypeStruct((batch, num_queries, num_heads, size), query.dtype)
    choices = []
    for num_tokens in sources:
        key, value = (
            jax.ShapeDtypeStruct((batch, num_heads, num_tokens, size), query.dtype) for size in (size, value_size)
        )
        choices.append(choose_flash_prefill(queries, key, value, implementation=asked))
    return next((choice for choice in choices if choice.backend == "xla"), choices[0])


def _misfit(query: Any, mask: Mask, cache: Any, execution: Execution) -> str | None:
    """Why no kernel takes such operands, whatever their sizes; None if one may."""
    bare = unstaged(cache)
    if num_staged(cache):
        return "staged tokens need a cache behind them and few new ones after them"
    if not (mask.span(is_new=True) and mask.span(is_new=False)):
        return f"its mask ({type(mask).__name__}) is no chain with a window"
    if query.shape[2] % execution.num_parts("N"):
        return f"{query.shape[2]} heads do not divide over {execution.num_parts('N')} devices"
    if bare is None:
        return None
    if type(bare) is not LatentCache:
        return f"it reads caches of the class LatentCache, this one is a {type(bare).__name__}"
    if bare.kept is not None:
        return "the cache marks which tokens it keeps"
    if bare.latent.dtype != query.dtype:
        return f"the cache holds {bare.latent.dtype} and the queries are {query.dtype}"
    if _block_tokens(bare.capacity) is None:
        return f"the cache's capacity must be a multiple of {BLOCK_TOKENS[-1]} tokens, got {bare.capacity}"
    return None


def _block_tokens(capacity: int) -> int | None:
    """How many cached tokens the kernel gets at a time; None where no number divides the cache."""
    return next((size for size in (min(capacity, BLOCK_TOKENS[0]), *BLOCK_TOKENS) if capacity % size == 0), None)


def _in_xla(query, rows: LatentRows, expand: Expansion, position, mask, cache, *, scale: float) -> Array:
    def heads(rows: LatentRows) -> KVRows:
        latent, rope_key = (tokens.astype(query.dtype) for tokens in (rows.latent, rows.rope_key))
        return KVRows(*_of_one_size(*expand(latent, rope_key)))

    new, bare = heads(rows), unstaged(cache)
    seen = None if bare is None else ExpandedCache(bare, expand)
    if isinstance(cache, Staged):
        seen = Staged(seen, heads(cache.rows), cache.position)
    query = padded(query, 3, new.key.shape[3])
    value_size = expand.value_up.shape[0] // expand.num_heads
    return attend_in_blocks(query, new, position, mask, seen, scale=scale)[..., :value_size]


def _of_one_size(key: Array, value: Array) -> tuple[Array, Array]:
    """Padded with zeros to the larger of their sizes: zeros add nothing to a score."""
    size = max(key.shape[3], value.shape[3])
    return padded(key, 3, size), padded(value, 3, size)


def _in_kernels(
    query, rows: LatentRows, expand: Expansion, position, mask, cache, *, scale: float, choice, execution: Execution
) -> Array:
    """The chunk itself, then the cache block by block up to the longest row, merged by their log-sum-exps."""
    options = {"scale": scale, "causal": True, "window": mask.span(is_new=True).window}
    # A broken token breaks who reads it and nobody else: 0 x NaN is NaN.
    is_sound = jnp.all(jnp.isfinite(rows.latent), axis=2, keepdims=True)
    latent, rope_key = jnp.where(is_sound, rows.latent, 0.0), jnp.where(is_sound, rows.rope_key, jnp.nan)

    def run(query, latent, rope_key, key_up, value_up, first, cached_latent, cached_rope_key, length) -> tuple[Array]:
        expand = Expansion(key_up, value_up, query.shape[2])

        def read(latent, rope_key, offset, length) -> tuple[Array, Array]:
            rows = {"offset": offset, "length": length, "implementation": choice.implementation}
            return flash_prefill(query, *expand(latent, rope_key), **rows, **options)

        start, end = (jnp.full_like(first, index) for index in (0, query.shape[1]))
        output, lse = read(latent, rope_key, start, end)
        if cached_latent is None:
            return (output,)
        block_tokens = _block_tokens(cached_latent.shape[1])
        assert block_tokens is not None  # `_misfit` has seen to it

        def step(block: Int[Array, ""], seen: tuple[Array, Array]) -> tuple[Array, Array]:
            (output, lse), start = seen, block * block_tokens
            latent, rope_key = (
                jax.lax.dynamic_slice_in_dim(buffer, start, block_tokens, axis=1)
                for buffer in (cached_latent, cached_rope_key)
            )
            # A row that ended before this block reads nothing of it, whatever its offset.
            mixed, block_lse = read(
                latent, rope_key, jnp.maximum(first - start, 0), jnp.clip(length - start, 0, block_tokens)
            )
            share = jax.nn.sigmoid(lse - block_lse)[..., None]  # a query reads itself, so `lse` is finite
            return output * share + mixed.astype(jnp.float32) * (1 - share), jnp.logaddexp(lse, block_lse)

        num_blocks = (jnp.max(length) + block_tokens - 1) // block_tokens
        seen = jax.lax.fori_loop(0, num_blocks, step, (output.astype(jnp.float32), lse))
        return (seen[0].astype(output.dtype),)

    cached = (None, None, None) if cache is None else (cache.latent, cache.rope_key, cache.length)
    axes = ("B T N H", "B T R", "B T H", "N R", "N R", "B")
    axes += (None, None, None) if cache is None else ("B S R", "B S H", "B")
    run = execution.per_device(run, axes, ("B T N H",))
    return run(query, latent, rope_key, expand.key_up, expand.value_up, position[:, 0], *cached)[0]
