"""Attention: the only entry through which a layer reads its cache and its new tokens.

softmax(scale q k^T + mask) v over the union of the cached keys and the keys of this forward, with grouped heads (GQA,
arXiv 2305.13245), an optional soft-cap on the scores (Gemma 2, arXiv 2408.00118) and optional learned sinks: a score
per head that takes its share of the softmax and adds nothing (gpt-oss, arXiv 2508.10925).

Where there is a kernel for this device that takes the operands, it does the work (`attend_kernels.py`); everywhere
else, and for gradients, plain JAX does (`attend_xla.py`).
"""

from functools import partial

from jaxtyping import Array, Float, Int

from decodax.layers.attention.attend_kernels import attend_in_kernels, choose_attention
from decodax.layers.attention.attend_xla import attend_in_xla
from decodax.layers.attention.gradients import with_gradients_of
from decodax.layers.attention.mask import Mask
from decodax.layers.attention.sinks import without_share
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache._contract import Cache
from decodax.layers.kv_cache.staged import Staged


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
    choice = choose_attention(query, key, value, mask, cache, execution)
    in_xla = partial(attend_in_xla, scale=scale, softcap=softcap)
    if choice.backend == "xla":
        return without_share(*in_xla(query, key, value, position, mask, cache), sink)
    in_kernels = partial(attend_in_kernels, scale=scale, softcap=softcap, choice=choice, execution=execution)

    attention = with_gradients_of(in_xla, in_kernels)
    output, lse = attention(query, key, value, position, mask, cache)
    return without_share(output, lse, sink)
