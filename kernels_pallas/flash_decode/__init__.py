"""Attention of a decoding step over a contiguous cache: T = 1..64 queries per row, lengths that differ between rows.

The T queries are a token being decoded, a chain of drafts or a token tree. Each reads its row's cached tokens and those
new tokens that `new.allowed` lets it. LeanAttention (arXiv 2405.10480) splits such work evenly over a GPU's cores
whatever the lengths; FlashAttention-2's online softmax (arXiv 2307.08691) is the inner body.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.choice import Choice, Implementation, choose_in
from decodax.kernels_pallas.new_tokens import NewTokens, check_operands, check_range

__all__ = ["NewTokens", "choose_flash_decode", "flash_decode"]


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
    """softmax(scale q k^T) v over the slots that a query reads and its new tokens, and the log-sum-exp of its scores.

    Query heads n = k G .. k G + G - 1 read key-value head k. Query t of row b reads slot s if s < length[b] and either
    s >= first[b, t] (None: every slot) or s < num_sink_tokens. What lies in slots from `length` on is never read as a
    value, be it NaN. A query that may read nothing gives 0 and a log-sum-exp of -inf.

    softcap: scores become softcap tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
    sink_logits: one more score per head, with the value 0; it is part of the log-sum-exp, so when parts are merged only
    one of them may have it.
    implementation: None takes the kernel of this device where it fits, and XLA elsewhere.

    The output has the queries' dtype; the log-sum-exp (natural logarithm) is float32, as are all sums.

    Raises ValueError for operands that do not fit each other, lengths outside 0..S (only if their values are known:
    inside `jit` they are clipped), and NotImplementedError if the implementation asked for does not take them.
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
    choice = choose_flash_decode(query, key, value, new, implementation=implementation)
    operands = (query, key, value, jnp.clip(length, 0, capacity), new)
    if choice.backend == "xla":
        from decodax.kernels_pallas.flash_decode import reference

        return reference.flash_decode(*operands, **options)
    if choice.backend == "tpu":
        from decodax.kernels_pallas.flash_decode import kernel_tpu

        return kernel_tpu.flash_decode(*operands, **options, interpret=choice.interpret)
    from decodax.kernels_pallas.flash_decode import kernel_gpu

    return kernel_gpu.flash_decode(*operands, **options, interpret=choice.interpret)


def choose_flash_decode(
    query: Any, key: Any, value: Any, new: NewTokens | None = None, *, implementation: Implementation | None = None
) -> Choice:
    """What `flash_decode` runs for operands of these shapes and dtypes, and why."""
    return choose_in("flash_decode", implementation, query, key, value, new)
