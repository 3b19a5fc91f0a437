"""Computes attention: the only entry through which a layer attends to its cache and its new tokens.

softmax(scale q k^T + mask) v over the union of the cached keys and the keys of this forward, with grouped heads (GQA,
arXiv 2305.13245), an optional soft-cap on the scores (Gemma 2, arXiv 2408.00118), optional biases that fall with the
distance (ALiBi, arXiv 2108.12409) and optional learned sinks: a score per head that takes its share of the softmax and
adds nothing (gpt-oss, arXiv 2508.10925).

`IMPLEMENTATIONS` lists how, and the first that supports the operands runs. Gradients are those of plain JAX.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from decodax.kernels_pallas.selection import KernelSelection, select_kernel
from decodax.layers.attention import attend_over_devices as over_devices
from decodax.layers.attention.attend_invariant import Tile, attend_invariant
from decodax.layers.attention.attend_xla import attend_in_xla
from decodax.layers.attention.implementations import AttentionImplementation, attention_by
from decodax.layers.attention.mask import Mask
from decodax.layers.attention.sinks import without_share
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache.view import CacheView

IMPLEMENTATIONS = {
    "split tokens": AttentionImplementation(
        over_devices.tokens_unsupported_reason, over_devices.attend_over_tokens, needs_mesh=True
    ),
    "split slots": AttentionImplementation(
        over_devices.slots_unsupported_reason, over_devices.attend_over_slots, needs_mesh=True
    ),
    "split heads": AttentionImplementation(
        over_devices.heads_unsupported_reason, over_devices.attend_over_heads, needs_mesh=True
    ),
    **over_devices.ON_ONE_DEVICE,
}


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K T H"],
    value: Float[Array, "B K T H"],
    position: Int[Array, "B T"],
    mask: Mask,
    cache: CacheView,
    *,
    scale: float,
    softcap: float | None,
    sink: Float[Array, " N"] | None = None,
    slopes: Float32[np.ndarray, " N"] | None = None,
    execution: Execution = ON_THIS_DEVICE,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """The attention output of each query, over cached and new tokens, and the log-sum-exp of its scores.

    query, key, value: of the T new tokens.
    position: of the new tokens.
    mask: which keys a query attends to; every query must attend to itself.
    cache: a view of the keys and values of earlier tokens. Tokens staged with them are new ones that come before those
        of this forward; those of a tile run in the invariant mode.
    scale: of the scores.
    softcap: scores become softcap tanh(score / softcap); None for none.
    sink: a learned score per head.
    slopes: of each head; its scores get slope x (position of the key - position of the query). In plain JAX only.
    execution: which kernels run, over which devices.

    Raises NotImplementedError if `execution` asks for a kernel that does not take these operands.
    """
    biases = None if slopes is None else jnp.asarray(slopes)
    options = {"scale": scale, "softcap": softcap}
    if isinstance(cache, Tile):
        return attend_invariant(query, key, value, position, mask, cache, **options, sink=sink, slopes=biases)
    operands = (query, key, value, position, mask, cache)
    if biases is not None:
        select_for_slopes(execution)
        return without_share(*attend_in_xla(*operands, **options, slopes=biases, execution=execution), sink)
    attention = attention_by(IMPLEMENTATIONS, operands, execution, **options)
    output, lse = attention(*operands)
    return without_share(output, lse, sink)


def select_for_slopes(execution: Execution) -> KernelSelection:
    """What runs for scores with slopes: plain JAX. NotImplementedError if `execution` asks for a kernel."""
    return select_kernel("attention", execution.implementation, lambda backend: "kernels add no slopes (ALiBi)")
