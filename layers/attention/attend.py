"""Attention: the only entry through which a layer reads its cache and its new tokens.

softmax(scale q k^T + mask) v over the union of the cached keys and the keys of this forward, with grouped heads (GQA,
arXiv 2305.13245), an optional soft-cap on the scores (Gemma 2, arXiv 2408.00118) and optional learned sinks: a score
per head that takes its share of the softmax and adds nothing (gpt-oss, arXiv 2508.10925).

Where there is a kernel for this device that takes the operands, it does the work (`attend_kernels.py`); everywhere
else, and for gradients, plain JAX does (`attend_xla.py`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.flash_prefill import flash_prefill
from decodax.layers.attention.attend_kernels import attend_in_kernels, choose_attention
from decodax.layers.attention.attend_xla import attend_in_xla
from decodax.layers.attention.contained import contained
from decodax.layers.attention.gradients import with_gradients_of
from decodax.layers.attention.mask import Mask
from decodax.layers.attention.over_context import OwnSlots, exchange, over_slots, over_tokens, what_is_split
from decodax.layers.attention.sinks import without_share
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache._contract import Cache
from decodax.layers.kv_cache.staged import Staged
from decodax.sharding.merging import Part


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    position: Int[Array, "B T"],
    mask: Mask,
    cache: Cache | Staged | None,
    *,
    scale: float,
    softcap: float | None,
    sink: Float[Array, " N"] | None = None,
    execution: Execution = ON_THIS_DEVICE,
) -> Float[Array, "B T N H"]:
    """Each query's mixture of the values it may read, cached and new; every query must be allowed to read itself.

    Tokens staged with the cache are new ones that stand before those of this forward.

    Raises NotImplementedError if `execution` asks for a kernel that does not take these operands.
    """
    options = {"scale": scale, "softcap": softcap}
    split = what_is_split(query.shape[1], query.shape[2], key.shape[1], mask, cache, execution)
    if split is None:
        attention = partial(_attend, execution=execution, **options)
    else:
        over = _over_tokens if split == "tokens" else _over_slots
        attention = with_gradients_of(partial(attend_in_xla, **options), over(mask, execution, options))
    output, lse = attention(query, key, value, position, mask, cache)
    return without_share(output, lse, sink)


def _attend(
    query, key, value, position, mask, cache, *, scale: float, softcap: float | None, execution: Execution
) -> tuple[Array, Array]:
    """The mixtures and their log-sum-exps, by the kernel that takes the operands or in plain JAX."""
    operands = (query, key, value, position, mask, cache)
    choice = choose_attention(query, key, value, mask, cache, execution)
    in_xla = partial(attend_in_xla, scale=scale, softcap=softcap)
    if choice.backend == "xla":
        return in_xla(*operands)
    in_kernels = partial(attend_in_kernels, scale=scale, softcap=softcap, choice=choice, execution=execution)
    return with_gradients_of(in_xla, in_kernels)(*operands)


_AXES = ("B T N H", "B K T H", "B K T H")


def _over_slots(mask: Mask, execution: Execution, options: dict[str, Any]) -> Any:
    """On every device over its slots of the cache: as if it were alone with them."""
    own = partial(_attend, execution=execution.on_one_device, **options)
    return over_slots(own, _AXES, execution)


def _over_tokens(mask: Mask, execution: Execution, options: dict[str, Any]) -> Any:
    """A chunk of a prompt of which every device has some tokens."""
    span = mask.span(is_new=True)
    assert span is not None  # `what_is_split` has seen to it

    def block(query: Array, key: Array, value: Array, offset: Array) -> Part:
        rows = {"offset": jnp.broadcast_to(offset, query.shape[:1]), "causal": True, "window": span.window}
        return Part(*flash_prefill(query, key, value, **rows, **options, implementation=execution.implementation))

    def among_new(query: Array, key: Array, value: Array) -> Part:
        sizes = {"result_size": value.shape[3], "window": span.window}
        return exchange(query, *contained(key, value), block, **sizes, execution=execution)

    def cached(query: Array, key: Array, value: Array, position: Array, mask: OwnSlots, cache: Any) -> Part:
        new = jax.ShapeDtypeStruct((*key.shape[:2], query.shape[1], key.shape[3]), key.dtype)
        choice = choose_attention(query, new, new, mask, cache, execution.on_one_device)
        if choice.backend == "xla":
            return Part(*attend_in_xla(query, key[:, :, :0], value[:, :, :0], position, mask, cache, **options))
        # Queries stand behind all cached tokens; where the device's slots begin behind them, there are none to read.
        rows = {"offset": jnp.maximum(position[:, 0] - mask.first, 0), "length": cache.length, "window": span.window}
        run = partial(flash_prefill, causal=True, **rows, **options, implementation=choice.implementation)
        return Part(*run(query, cache.key, cache.value))

    return over_tokens(among_new, cached, _AXES, execution)
