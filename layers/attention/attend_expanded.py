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
from decodax.layers.attention.over_context import OwnSlots, exchange, over_slots, over_tokens, what_is_split
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.full import KVRows
from decodax.layers.kv_cache.latent import LatentCache, LatentRows
from decodax.layers.kv_cache.part import CachePart
from decodax.layers.kv_cache.staged import Staged, num_staged, unstaged
from decodax.layers.linear import linear
from decodax.sharding.merging import Part, merge

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
            by_head = (self.num_heads, weight.shape[0] // self.num_heads)
            return jnp.moveaxis(flat.reshape(*latent.shape[:2], *by_head), 2, 1)

        shared = jnp.broadcast_to(rope_key[:, None], (latent.shape[0], self.num_heads, *rope_key.shape[1:]))
        return jnp.concatenate([heads(self.key_up), shared], axis=3), heads(self.value_up)


@pytree.dataclass
class ExpandedCache:
    """Reads a cache of latents as the keys and values of all heads. Values are padded with zeros to the keys' size."""

    latents: LatentCache | CachePart
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
    cache: LatentCache | CachePart | Staged | None,
    *,
    scale: float,
    execution: Execution,
) -> Float[Array, "B T N J"]:
    """Each query's mixture of the values of the tokens it may read, cached and new (`rows`); it must read itself.

    query: per head without position, then with. Tokens staged with the cache are new ones that stand before these.

    Raises NotImplementedError if `execution` asks for a kernel that does not take these operands.
    """
    operands = (query, rows, expand.key_up, expand.value_up, position, mask, cache)
    split = what_is_split(query.shape[1], query.shape[2], query.shape[2], mask, cache, execution)
    attention = partial(_attend, scale=scale, execution=execution)
    if split is not None:
        over = _over_tokens if split == "tokens" else _over_slots
        attention = with_gradients_of(partial(_in_xla, scale=scale), over(mask, scale, execution))
    return attention(*operands)[0]


def _attend(
    query, rows: LatentRows, key_up, value_up, position, mask, cache, *, scale: float, execution: Execution
) -> tuple[Array, Array]:
    """The mixtures and their log-sum-exps, by the kernel if it takes the operands or in plain JAX."""
    operands = (query, rows, key_up, value_up, position, mask, cache)
    choice = choose_expanded(query, value_up.shape[0] // query.shape[2], mask, cache, execution)
    in_xla = partial(_in_xla, scale=scale)
    if choice.backend == "xla":
        return in_xla(*operands)
    in_kernels = partial(_in_kernels, scale=scale, choice=choice, execution=execution)
    return with_gradients_of(in_xla, in_kernels)(*operands)


def _over_slots(mask: Mask, scale: float, execution: Execution) -> Any:
    """On every device over its slots of the cache: as if it were alone with them."""
    own = partial(_attend, scale=scale, execution=execution.on_one_device)
    return over_slots(own, ("B T N H", None, "N R", "N R"), execution)


def _over_tokens(mask: Mask, scale: float, execution: Execution) -> Any:
    """A chunk of a prompt of which every device has some tokens: latents are sent, and not what is made of them."""
    span = mask.span(is_new=True)
    assert span is not None  # `what_is_split` has seen to it
    options = {"scale": scale, "causal": True, "window": span.window}
    alone = execution.on_one_device

    def among_new(query: Array, latent: Array, rope_key: Array, key_up: Array, value_up: Array) -> Part:
        def block(query: Array, latent: Array, rope_key: Array, offset: Array) -> Part:
            num_heads = query.shape[2]  # Ulysses gives a device some of them
            own_key_up, own_value_up = _of_heads(key_up, value_up, num_heads, all_heads, execution)
            expand = Expansion(own_key_up, own_value_up, num_heads)
            key, value = expand(latent[:, 0], rope_key[:, 0])
            rows = {"offset": jnp.broadcast_to(offset, query.shape[:1]), "implementation": execution.implementation}
            return Part(*flash_prefill(query, key, value, **rows, **options))

        all_heads = query.shape[2]
        sizes = {"result_size": value_up.shape[0] // all_heads, "window": span.window}
        latent, rope_key = _contained(latent, rope_key)
        return exchange(query, latent[:, None], rope_key[:, None], block, **sizes, execution=execution)

    def cached(query, latent, rope_key, key_up, value_up, position, mask: OwnSlots, cache: LatentCache) -> Part:
        expand, value_size = Expansion(key_up, value_up, query.shape[2]), value_up.shape[0] // query.shape[2]
        choice = choose_expanded(query, value_size, mask, cache, alone)
        if choice.backend == "xla":
            none = LatentRows(latent[:, :0], rope_key[:, :0])
            return Part(*_in_xla(query, none, key_up, value_up, position, mask, cache, scale=scale))
        # Queries stand behind all cached tokens; where the device's slots begin behind them, there are none to read.
        first = jnp.maximum(position[:, 0] - mask.first, 0)
        nothing = Part(jnp.zeros((*query.shape[:3], value_size), jnp.float32), jnp.full(query.shape[:3], -jnp.inf))
        return _read_blocks(nothing, query, expand, first, cache, {**options, "implementation": choice.implementation})

    def attention(query, rows: LatentRows, *others: Any) -> tuple[Array, Array]:
        return over(query, rows.latent, rows.rope_key, *others)

    over = over_tokens(among_new, cached, ("B T N H", "B T R", "B T H", "N R", "N R"), execution)
    return attention


def _of_heads(key_up: Array, value_up: Array, num_heads: int, all_heads: int, execution: Execution) -> list[Array]:
    """The rows of W_uk and W_uv for the heads that this device has of all."""
    if num_heads == all_heads:
        return [key_up, value_up]
    device = jax.lax.axis_index(execution.mesh_axes("T"))
    sizes = (weight.shape[0] // all_heads * num_heads for weight in (key_up, value_up))
    return [
        jax.lax.dynamic_slice_in_dim(weight, device * size, size)
        for weight, size in zip((key_up, value_up), sizes, strict=True)
    ]


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


def _in_xla(query, rows: LatentRows, key_up, value_up, position, mask, cache, *, scale: float) -> tuple[Array, Array]:
    expand, value_size = Expansion(key_up, value_up, query.shape[2]), value_up.shape[0] // query.shape[2]

    def heads(rows: LatentRows) -> KVRows:
        latent, rope_key = (tokens.astype(query.dtype) for tokens in (rows.latent, rows.rope_key))
        return KVRows(*_of_one_size(*expand(latent, rope_key)))

    new, bare = heads(rows), unstaged(cache)
    seen = None if bare is None else ExpandedCache(bare, expand)
    if isinstance(cache, Staged):
        seen = Staged(seen, heads(cache.rows), cache.position)
    query = padded(query, 3, new.key.shape[3])
    output, lse = attend_in_blocks(query, new, position, mask, seen, scale=scale)
    return output[..., :value_size], lse


def _of_one_size(key: Array, value: Array) -> tuple[Array, Array]:
    """Padded with zeros to the larger of their sizes: zeros add nothing to a score."""
    size = max(key.shape[3], value.shape[3])
    return padded(key, 3, size), padded(value, 3, size)


def _contained(latent: Float[Array, "B T R"], rope_key: Float[Array, "B T H"]) -> tuple[Array, Array]:
    """A broken token breaks who reads it and nobody else: 0 x NaN is NaN."""
    is_sound = jnp.all(jnp.isfinite(latent), axis=2, keepdims=True)
    return jnp.where(is_sound, latent, 0.0), jnp.where(is_sound, rope_key, jnp.nan)


def _in_kernels(
    query, rows: LatentRows, key_up, value_up, position, mask, cache, *, scale: float, choice, execution: Execution
) -> tuple[Array, Array]:
    """The chunk itself, then the cache block by block up to the longest row, merged by their log-sum-exps."""
    options = {"scale": scale, "causal": True, "window": mask.span(is_new=True).window}
    options["implementation"] = choice.implementation

    def run(query, latent, rope_key, key_up, value_up, first, cache) -> tuple[Array, Array]:
        expand = Expansion(key_up, value_up, query.shape[2])
        start, end = (jnp.full_like(first, index) for index in (0, query.shape[1]))
        output, lse = flash_prefill(query, *expand(latent, rope_key), offset=start, length=end, **options)
        if cache is None:
            return output, lse
        lse = jnp.where(lse == -jnp.inf, jnp.nan, lse)  # a query reads itself: one that says it read nothing is broken
        seen = _read_blocks(Part(output.astype(jnp.float32), lse), query, expand, first, cache, options)
        return seen.output.astype(output.dtype), seen.lse

    axes = ("B T N H", "B T R", "B T H", "N R", "N R", "B", None)
    run = execution.per_device(run, axes, ("B T N H", "B T N"))
    return run(query, *_contained(rows.latent, rows.rope_key), key_up, value_up, position[:, 0], cache)


def _read_blocks(
    seen: Part, query: Array, expand: Expansion, first: Array, cache: LatentCache, options: dict[str, Any]
) -> Part:
    """`seen` with what queries read of a cache whose tokens are the `first` ones before the first query."""
    block_tokens = _block_tokens(cache.capacity)
    assert block_tokens is not None  # `_misfit` has seen to it

    def step(block: Int[Array, ""], seen: Part) -> Part:
        start = block * block_tokens
        latent, rope_key, *_ = cache.read_latents(start, block_tokens)
        # A row that ended before this block reads nothing of it, whatever its offset.
        offset, length = jnp.maximum(first - start, 0), jnp.clip(cache.length - start, 0, block_tokens)
        part = flash_prefill(query, *expand(latent, rope_key), offset=offset, length=length, **options)
        return merge(seen, Part(*part))

    num_blocks = (jnp.max(cache.length) + block_tokens - 1) // block_tokens
    return jax.lax.fori_loop(0, num_blocks, step, seen)
