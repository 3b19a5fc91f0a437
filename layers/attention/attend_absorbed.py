"""Latent attention on the latents themselves, for few new tokens: a decoding step, a chain of drafts, a token tree.

A head's key is W_uk c and its value W_uv c, for the latent c of a token (DeepSeek-V2, arXiv 2405.04434, section 2.1).
With W_uk multiplied into the query, and W_uv into what comes out, all heads read the latents as one key-value head:
score = (query_latent . latent + query_rope . rope_key) scale, output = the mixture of latents.

`mla_decode` does this where it takes the operands; it reads every latent once. Everywhere else plain JAX does.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.choice import Choice, choose
from decodax.kernels_pallas.mla_decode import MAX_QUERIES, NewLatents, choose_mla_decode, mla_decode
from decodax.kernels_pallas.new_tokens import MAX_NEW_TOKENS
from decodax.layers.attention.attend_xla import BLOCK_TOKENS, attend_in_xla
from decodax.layers.attention.gradients import with_gradients_of
from decodax.layers.attention.mask import Mask, Span, Tokens
from decodax.layers.attention.over_context import over_slots, what_is_split
from decodax.layers.execution import Execution
from decodax.layers.kv_cache._contract import Cache
from decodax.layers.kv_cache.full import KVRows
from decodax.layers.kv_cache.latent import LatentCache, LatentRows
from decodax.layers.kv_cache.part import CachePart
from decodax.layers.kv_cache.staged import Staged, num_staged, unstaged

ACCELERATOR_BLOCK_TOKENS = 2048  # a step of a loop costs a host round trip there; not measured


def attend_absorbed(
    query_latent: Float[Array, "B T N R"],
    query_rope: Float[Array, "B T N H"],
    rows: LatentRows,
    position: Int[Array, "B T"],
    mask: Mask,
    cache: LatentCache | CachePart | Staged,
    *,
    scale: float,
    execution: Execution,
) -> Float[Array, "B T N R"]:
    """Each query's mixture of the latents it may read, cached and new (`rows`); every query must read itself.

    Tokens staged with the cache are new ones that stand before those of this forward.

    Raises NotImplementedError if `execution` asks for a kernel that does not take these operands.
    """
    num_heads = query_latent.shape[2]
    attention = partial(_attend, scale=scale, execution=execution)
    if what_is_split(query_latent.shape[1], num_heads, num_heads, mask, cache, execution) is not None:
        own = partial(_attend, scale=scale, execution=execution.on_one_device)
        over_devices = over_slots(own, ("B T N R", "B T N H", None), execution)
        attention = with_gradients_of(partial(_in_xla, scale=scale), over_devices)
    return attention(query_latent, query_rope, rows, position, mask, cache)[0]


def _attend(
    query_latent, query_rope, rows: LatentRows, position, mask, cache, *, scale: float, execution: Execution
) -> tuple[Array, Array]:
    """The mixtures and their log-sum-exps, by the kernel if it takes the operands or in plain JAX."""
    choice = choose_absorbed(query_latent, query_rope, mask, cache, execution)
    in_xla = partial(_in_xla, scale=scale)
    operands = (query_latent, query_rope, rows, position, mask, cache)
    if choice.backend == "xla":
        return in_xla(*operands)
    in_kernels = partial(_in_kernels, scale=scale, choice=choice, execution=execution)
    return with_gradients_of(in_xla, in_kernels)(*operands)


def choose_absorbed(query_latent: Any, query_rope: Any, mask: Mask, cache: Any, execution: Execution) -> Choice:
    """What `attend_absorbed` runs for its operands (arrays or their shapes), and why.

    Raises NotImplementedError if `execution` asks for a kernel that does not take them.
    """
    asked = execution.implementation
    choice = choose("mla_decode", asked, lambda backend: _misfit(query_latent, mask, cache, execution))
    if choice.backend == "xla":
        return choice
    batch, num_queries, num_heads, _ = query_latent.shape
    bare, num_new = unstaged(cache), num_queries + num_staged(cache)

    def part(query: Any) -> jax.ShapeDtypeStruct:
        heads = num_heads // execution.num_parts("N")
        return jax.ShapeDtypeStruct((batch, min(num_queries, MAX_QUERIES), heads, query.shape[3]), query.dtype)

    def new(cached: Any) -> Any:
        return jax.ShapeDtypeStruct((batch, num_new, cached.shape[2]), cached.dtype)

    allowed: Any = jax.ShapeDtypeStruct((batch, min(num_queries, MAX_QUERIES), num_new), bool)
    latents = NewLatents(new(bare.latent), new(bare.rope_key), allowed)
    return choose_mla_decode(
        part(query_latent), part(query_rope), bare.latent, bare.rope_key, latents, implementation=asked
    )


def _misfit(query_latent: Any, mask: Mask, cache: Any, execution: Execution) -> str | None:
    """Why no kernel takes such operands, whatever their sizes; None if one may."""
    bare, num_new = unstaged(cache), query_latent.shape[1] + num_staged(cache)
    if type(bare) is not LatentCache:
        return f"it reads caches of the class LatentCache, this one is a {type(bare).__name__}"
    if bare.kept is not None:
        return "the cache marks which tokens it keeps"
    if bare.latent.dtype != query_latent.dtype:
        return f"the cache holds {bare.latent.dtype} and the queries are {query_latent.dtype}"
    if num_new > MAX_NEW_TOKENS:
        return f"it takes at most {MAX_NEW_TOKENS} new and staged tokens, these are {num_new}"
    if mask.span(is_new=False) != Span(None):
        return f"its mask ({type(mask).__name__}) does not let every query read all cached tokens"
    num_parts = execution.num_parts("N")
    if query_latent.shape[2] % num_parts:
        return f"{query_latent.shape[2]} heads do not divide over {num_parts} devices"
    return None


def _in_xla(query_latent, query_rope, rows: LatentRows, position, mask, cache, *, scale: float) -> tuple[Array, Array]:
    """As attention with one key-value head, whose keys and values are latents with their rope keys."""

    def one_head(rows: LatentRows) -> KVRows:
        tokens = jnp.concatenate([rows.latent, rows.rope_key], axis=2)[:, None]
        return KVRows(tokens, tokens)

    query = jnp.concatenate([query_latent, query_rope], axis=3)
    new = one_head(rows)
    if isinstance(cache, Staged):
        cache = Staged(cache.cache, one_head(cache.rows), cache.position)
    output, lse = attend_in_blocks(query, new, position, mask, cache, scale=scale)
    return output[..., : query_latent.shape[3]], lse


def attend_in_blocks(
    query: Float[Array, "B T N H"],
    new: KVRows,
    position: Int[Array, "B T"],
    mask: Mask,
    cache: Cache | Staged | None,
    *,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention in plain JAX over a cache that makes what it gives: block by block, and never the whole cache at once.

    As `attend_in_xla`, of which the new tokens may be none.

    With 16,384 latents on CPU, a step that reads them all takes 4.5 times as long as one that reads blocks of them.
    """
    block_tokens = BLOCK_TOKENS if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK_TOKENS
    options = {"scale": scale, "softcap": None, "block_tokens": block_tokens}
    return attend_in_xla(query, new.key, new.value, position, mask, cache, **options)


def _in_kernels(
    query_latent, query_rope, rows: LatentRows, position, mask, cache, *, scale: float, choice, execution: Execution
) -> tuple[Array, Array]:
    """MAX_QUERIES queries at a time: with 16 heads they are more rows than a cached token's bytes pay for (see there).

    So reading the cache again for the next of them costs no time.
    """
    key_position, bare = position, unstaged(cache)
    if isinstance(cache, Staged):
        rows = rows.behind(cache.rows)
        key_position = jnp.concatenate([cache.position, position], axis=1)
    allowed = mask.allows(Tokens(position, is_new=True), Tokens(key_position, is_new=True))
    allowed = jnp.broadcast_to(allowed, (*position.shape, key_position.shape[1]))
    num_queries = position.shape[1]

    def run(
        query_latent, query_rope, latent, rope_key, length, new_latent, new_rope_key, allowed
    ) -> tuple[Array, Array]:
        def some(start: int) -> tuple[Array, Array]:
            queries = slice(start, min(start + MAX_QUERIES, num_queries))
            new = NewLatents(new_latent, new_rope_key, allowed[:, queries])
            own = query_latent[:, queries], query_rope[:, queries]
            return mla_decode(*own, latent, rope_key, length, new, scale=scale, implementation=choice.implementation)

        outputs, lses = zip(*(some(start) for start in range(0, num_queries, MAX_QUERIES)), strict=True)
        return jnp.concatenate(outputs, axis=1), jnp.concatenate(lses, axis=1)

    axes = ("B T N R", "B T N H", "B S R", "B S H", "B", "B S R", "B S H", "B T S")
    run = execution.per_device(run, axes, ("B T N R", "B T N"))
    return run(query_latent, query_rope, bare.latent, bare.rope_key, bare.length, rows.latent, rows.rope_key, allowed)
