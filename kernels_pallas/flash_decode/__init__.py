"""Computes decode attention over a contiguous cache: T = 1..64 queries per row, lengths that differ between rows.

The T queries are a token being decoded, a chain of draft tokens or a token tree. Each attends to its row's cached
tokens and to the new tokens in `new.allowed`. LeanAttention (arXiv 2405.10480) splits such work evenly over a GPU's
cores whatever the lengths; FlashAttention-2's online softmax (arXiv 2307.08691) is the inner body.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.decode.new_tokens import NewTokens, check_operands, check_range
from decodax.kernels_pallas.selection import Implementation, KernelSelection, select_in_folder

__all__ = ["NewTokens", "flash_decode", "select_flash_decode"]


def flash_decode(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    length: Int[Array, " B"],
    new: NewTokens | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    first: Int[Array, "B T"] | None = None,
    num_sink_tokens: int = 0,
    sink_logits: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """softmax(scale q k^T) v over a query's cached slots and new tokens, and the log-sum-exp of its scores.

    Query heads n = k G .. k G + G - 1 use key-value head k. Query t of row b attends to slot s if s < length[b] and
    either s >= first[b, t] (None: every slot) or s < num_sink_tokens. Slots from `length` on are never used as values,
    and may be NaN. A query that attends to nothing gives 0 and a log-sum-exp of -inf.

    query: of T new tokens.
    key, value: the cache.
    length: cached tokens per row.
    new: tokens that are not in the cache.
    scale: of the scores.
    softcap: scores become softcap tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
    first: first slot of each query's window.
    num_sink_tokens: attended to besides the window.
    sink_logits: one more score per head, with the value 0; the log-sum-exp includes it, so only one of the partial
        softmaxes that are merged may have it.
    implementation: None takes the kernel of this device if it supports the operands, else XLA.

    The output has the queries' dtype; the log-sum-exp (natural logarithm) is float32, as are all sums.

    Raises ValueError for operands that do not fit each other and lengths outside 0..S (only if their values are known:
    inside `jit` they are clipped).
    Raises NotImplementedError if the implementation asked for does not support the operands.
    """
    check_operands("flash_decode", query, key.shape[1], key.shape[3], value.shape[3], new)
    capacity = key.shape[2]
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(f"keys and values must agree in [B, K, S], got {key.shape[:3]} and {value.shape[:3]}")
    check_range("length", length, 0, capacity, "the cache holds no more tokens (S)")
    if not 0 <= num_sink_tokens <= capacity:
        raise ValueError(f"num_sink_tokens must be in 0..{capacity} (S, the cache's slots), got {num_sink_tokens}")
    options: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "first": first,
        "num_sink_tokens": num_sink_tokens,
        "sink_logits": sink_logits,
    }
    selection = select_flash_decode(query, key, value, new, implementation=implementation)
    operands = (query, key, value, jnp.clip(length, 0, capacity), new)
    if selection.backend == "xla":
        from decodax.kernels_pallas.flash_decode import reference

        return reference.flash_decode(*operands, **options)
    if selection.backend == "tpu":
        from decodax.kernels_pallas.flash_decode import kernel_tpu

        return kernel_tpu.flash_decode(*operands, **options, interpret=selection.interpret)
    from decodax.kernels_pallas.flash_decode import kernel_gpu

    return kernel_gpu.flash_decode(*operands, **options, interpret=selection.interpret)


def select_flash_decode(
    query: Any, key: Any, value: Any, new: NewTokens | None = None, *, implementation: Implementation | None = None
) -> KernelSelection:
    """The implementation of `flash_decode` for operands of these shapes and dtypes, and the reason."""
    return select_in_folder("flash_decode", implementation, query, key, value, new)
