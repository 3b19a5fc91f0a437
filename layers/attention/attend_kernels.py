"""Attention by the kernels of `kernels_pallas/`, for the operands that they take.

Up to 64 new tokens per row behind a cache (a token being decoded, a chain of drafts, a tree) are one `flash_decode`,
which reads the cache and the new tokens. All else is a chunk of a prompt: `flash_prefill` runs over the chunk itself
and over the cached prefix, and the two are merged by their log-sum-exps.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.choice import Choice, choose
from decodax.kernels_pallas.flash_decode import NewTokens, choose_flash_decode, flash_decode
from decodax.kernels_pallas.flash_prefill import choose_flash_prefill, flash_prefill
from decodax.layers.attention.contained import contained
from decodax.layers.attention.mask import Mask, Tokens
from decodax.layers.execution import Execution
from decodax.layers.kv_cache._contract import Cache
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.staged import Staged, num_staged, unstaged

LANES = 128  # of a TPU
_KEYS = "B K S H"
DECODE_TOKENS = 64  # new tokens per row up to which a forward is a decoding step, bound by reading the cache


def choose_attention(
    query: Any, key: Any, value: Any, mask: Mask, cache: Cache | Staged | None, execution: Execution
) -> Choice:
    """What `attend` runs for its operands (arrays or their shapes), and why.

    Raises NotImplementedError if `execution` asks for a kernel that does not take them.
    """
    asked, num_queries, is_step = execution.implementation, query.shape[1], _is_step(query, cache)
    name = "flash_decode" if is_step else "flash_prefill"

    def misfit(backend: str) -> str | None:
        found = _misfit(query, key, mask, cache, execution)
        if found is None and backend == "tpu" and asked is None and is_step and key.shape[3] % LANES:
            # Seen in programs compiled for v5e: what writes the cache and what reads it want it in different layouts.
            return f"XLA would copy caches of head size {key.shape[3]}, no multiple of {LANES}, at every step"
        return found

    choice = choose(name, asked, misfit)
    if choice.backend == "xla":
        return choice
    bare = unstaged(cache)
    query_part = _part(query, "B T N H", execution)
    own = _part(key, _KEYS, execution), _part(value, _KEYS, execution)
    cached: Any = () if bare is None else (_part(bare.key, _KEYS, execution), _part(bare.value, _KEYS, execution))
    if is_step:
        num_new = num_staged(cache) + num_queries
        new: list[Any] = [jax.ShapeDtypeStruct((*rows.shape[:2], num_new, rows.shape[3]), rows.dtype) for rows in own]
        allowed: Any = jax.ShapeDtypeStruct((query_part.shape[0], num_queries, num_new), bool)
        tokens = NewTokens(new[0], new[1], allowed)
        return choose_flash_decode(query_part, cached[0], cached[1], tokens, implementation=asked)
    sources = (own, cached) if cached else (own,)
    choices = [choose_flash_prefill(query_part, *source, implementation=asked) for source in sources]
    return next((choice for choice in choices if choice.backend == "xla"), choices[0])


def _misfit(query: Any, key: Any, mask: Mask, cache: Cache | Staged | None, execution: Execution) -> str | None:
    """Why no kernel takes such operands, whatever their sizes; None if one may."""
    is_step, bare = _is_step(query, cache), unstaged(cache)
    if bare is not None and type(bare) is not KVCache:
        return f"it reads caches of the class KVCache, this one is a {type(bare).__name__}"
    if bare is not None and bare.kept is not None:
        return "the cache marks which tokens it keeps"
    if bare is not None and bare.key.dtype != query.dtype:
        return f"the cache holds {bare.key.dtype} and the queries are {query.dtype}"
    if num_staged(cache) and not is_step:
        return f"staged tokens need a cache behind them and at most {DECODE_TOKENS} new ones after them"
    if mask.span(is_new=False) is None or not (is_step or mask.span(is_new=True)):
        return f"its mask ({type(mask).__name__}) is no chain with a window"
    num_heads, num_kv_heads = query.shape[2], key.shape[1]
    num_parts, num_kv_parts = execution.num_parts("N"), execution.num_parts("K", num_kv_heads)
    if num_heads % num_parts or num_kv_parts not in (num_parts, num_kv_heads):
        return f"{num_heads} heads for {num_kv_heads} of keys and values do not divide over {num_parts} devices"
    return None


def _is_step(query: Any, cache: Any) -> bool:
    """Whether `flash_decode` has to do with it: few new tokens, behind a cache."""
    return query.shape[1] <= DECODE_TOKENS and unstaged(cache) is not None


def _part(operand: Any, axes: str, execution: Execution) -> jax.ShapeDtypeStruct:
    """The shape of what one device has of an operand: of its rows and of its heads."""
    return jax.ShapeDtypeStruct(execution.part_shape(operand.shape, axes), operand.dtype)


def attend_in_kernels(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    position: Int[Array, "B T"],
    mask: Mask,
    cache: Any,
    *,
    scale: float,
    softcap: float | None,
    choice: Choice,
    execution: Execution,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """What `attend_in_xla` gives, for operands that the implementation of `choice` takes."""
    options = {"scale": scale, "softcap": softcap, "implementation": choice.implementation}
    attention = _step if _is_step(query, cache) else _chunk
    return attention(query, key, value, position, mask, cache, options, execution)


def _step(
    query, key, value, position, mask, cache, options: dict[str, Any], execution: Execution
) -> tuple[Array, Array]:
    """The new tokens of a decoding step, and staged ones before them, in one kernel with the cache."""
    key_position, bare = position, unstaged(cache)
    if isinstance(cache, Staged):
        key = jnp.concatenate([cache.rows.key.astype(key.dtype), key], axis=2)
        value = jnp.concatenate([cache.rows.value.astype(value.dtype), value], axis=2)
        key_position = jnp.concatenate([cache.position, position], axis=1)
    key, value = contained(key, value)
    allowed = mask.allows(Tokens(position, is_new=True), Tokens(key_position, is_new=True))
    allowed = jnp.broadcast_to(allowed, (*position.shape, key.shape[2]))
    first = None if mask.span(is_new=False).window is None else mask.first_visible(position)

    def run(query, cached_key, cached_value, length, key, value, allowed, first) -> tuple[Array, Array]:
        new = NewTokens(key, value, allowed)
        return flash_decode(query, cached_key, cached_value, length, new, first=first, **options)

    per_query = None if first is None else "B T"
    axes = ("B T N H", _KEYS, _KEYS, "B", _KEYS, _KEYS, "B T S", per_query)
    run = execution.per_device(run, axes, ("B T N H", "B T N"))
    return run(query, bare.key, bare.value, bare.length, key, value, allowed, first)


def _chunk(
    query, key, value, position, mask, cache, options: dict[str, Any], execution: Execution
) -> tuple[Array, Array]:
    """A chunk of a prompt; it is a chain, so its tokens stand one behind the other."""
    window = mask.span(is_new=True).window

    def run(query, key, value, offset, length) -> tuple[Array, Array]:
        rows = {"offset": offset, "length": length, "causal": True, "window": window}
        return flash_prefill(query, key, value, **rows, **options)

    run = execution.per_device(run, ("B T N H", _KEYS, _KEYS, "B", "B"), ("B T N H", "B T N"))
    batch, num_new = position.shape
    start, end = (jnp.full(batch, index, jnp.int32) for index in (0, num_new))
    output, lse = run(query, *contained(key, value), start, end)
    if cache is None:
        return output, lse
    cached_output, cached_lse = run(query, cache.key, cache.value, position[:, 0], cache.length)
    # Every query reads at least itself among the new ones, so `lse` is finite.
    share = jax.nn.sigmoid(lse - cached_lse)[..., None]
    mixed = output.astype(jnp.float32) * share + cached_output.astype(jnp.float32) * (1 - share)
    return mixed.astype(output.dtype), jnp.logaddexp(lse, cached_lse)
