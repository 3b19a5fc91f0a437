"""Computes decode attention of MLA: all heads of T = 1..16 queries share one latent and one rope key per cached token.

Multi-head latent attention with absorbed weights (DeepSeek-V2, arXiv 2405.04434, section 2.1): a cached token is a
latent of R numbers, shared by all heads, and a rope key of H. A head's query, multiplied by its slice of W_uk, is a
vector of R that is multiplied with the latent itself, and the head's output is a weighted sum of latents that the
caller multiplies by W_uv. So the latent is both key and value, and is read once. It is attention with one key-value
head, head size R + H for the scores and R for the values.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.decode.new_tokens import MAX_NEW_TOKENS, check_range
from decodax.kernels_pallas.mla_decode.new_latents import NewLatents
from decodax.kernels_pallas.selection import Implementation, KernelSelection, select_in_folder

__all__ = ["MAX_QUERIES", "NewLatents", "mla_decode", "select_mla_decode"]

MAX_QUERIES = 16


def mla_decode(
    query_latent: Float[Array, "B T N R"],
    query_rope: Float[Array, "B T N H"],
    latent: Float[Array, "B S R"],
    rope_key: Float[Array, "B S H"],
    length: Int[Array, " B"],
    new: NewLatents | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """Weighted sums of latents, and the log-sum-exp of each query's scores.

    score = (query_latent . latent + query_rope . rope_key) scale. Every query of row b attends to the slots
    s < length[b], and to the new tokens in `new.allowed`. Slots from `length` on are masked, and may be NaN. A query
    that attends to nothing gives 0 and a log-sum-exp of -inf. A new token with a non-finite latent makes NaN of the
    queries that attend to it, and of no others.

    query_latent: the queries multiplied by W_uk (absorbed); the caller multiplies the output by W_uv.
    query_rope: the rotated coordinates of the queries.
    latent, rope_key: the cache.
    length: cached tokens per row.
    new: tokens that are not in the cache.
    scale: of the scores.
    softcap: scores become softcap tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
    implementation: None takes the kernel of this device if it supports the operands, else XLA.

    The output has the queries' dtype; the log-sum-exp (natural logarithm) is float32, as are all sums.

    Raises ValueError for operands that do not fit each other and lengths outside 0..S (only if their values are known:
    inside `jit` they are clipped).
    Raises NotImplementedError if the implementation asked for does not support the operands.
    """
    _check(query_latent, query_rope, latent, rope_key, new)
    capacity = latent.shape[1]
    check_range("length", length, 0, capacity, "the cache holds no more tokens (S)")
    selection = select_mla_decode(query_latent, query_rope, latent, rope_key, new, implementation=implementation)
    operands = (query_latent, query_rope, latent, rope_key, jnp.clip(length, 0, capacity).astype(jnp.int32), new)
    with jax.named_scope("mla_decode"):
        if selection.backend == "xla":
            from decodax.kernels_pallas.mla_decode import reference

            return reference.mla_decode(*operands, scale=scale, softcap=softcap)
        if selection.backend == "tpu":
            from decodax.kernels_pallas.mla_decode import kernel_tpu

            return kernel_tpu.mla_decode(*operands, scale=scale, softcap=softcap, interpret=selection.interpret)
        from decodax.kernels_pallas.mla_decode import kernel_gpu

        return kernel_gpu.mla_decode(*operands, scale=scale, softcap=softcap, interpret=selection.interpret)


def select_mla_decode(
    query_latent: Any,
    query_rope: Any,
    latent: Any,
    rope_key: Any,
    new: NewLatents | None = None,
    *,
    implementation: Implementation | None = None,
) -> KernelSelection:
    """The implementation of `mla_decode` for operands of these shapes and dtypes, and the reason."""
    return select_in_folder("mla_decode", implementation, query_latent, query_rope, latent, rope_key, new)


def _check(query_latent: Any, query_rope: Any, latent: Any, rope_key: Any, new: NewLatents | None) -> None:
    """Raises ValueError for operands that do not fit together."""
    batch, num_queries, num_heads, rank = query_latent.shape
    capacity, rope_size = rope_key.shape[1:]
    if not 1 <= num_queries <= MAX_QUERIES:
        raise ValueError(f"mla_decode takes 1 to {MAX_QUERIES} queries (T) per row, got {num_queries}")
    expected = {
        "query_latent": (query_latent, query_latent.shape),
        "query_rope": (query_rope, (batch, num_queries, num_heads, rope_size)),
        "latent": (latent, (batch, capacity, rank)),
        "rope_key": (rope_key, (batch, capacity, rope_size)),
    }
    if new is not None:
        num_new = new.latent.shape[1]
        if not 1 <= num_new <= MAX_NEW_TOKENS:
            raise ValueError(
                f"new tokens (U) must be 1 to {MAX_NEW_TOKENS}, got {num_new}; commit some to the cache first"
            )
        expected["new.latent"] = (new.latent, (batch, num_new, rank))
        expected["new.rope_key"] = (new.rope_key, (batch, num_new, rope_size))
        expected["new.allowed"] = (new.allowed, (batch, num_queries, num_new))
    for name, (operand, shape) in expected.items():
        if operand.shape != shape:
            raise ValueError(f"{name} must have shape {shape} beside the other operands, got {operand.shape}")
        if name != "new.allowed" and operand.dtype != latent.dtype:
            raise ValueError(f"all operands must have one dtype, latent has {latent.dtype} and {name} {operand.dtype}")
