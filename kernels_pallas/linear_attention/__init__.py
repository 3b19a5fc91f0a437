"""Computes linear attention with decay: a recurrent state per head, updated token by token, computed chunk by chunk.

S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t,  o_t = scale * q_t S_t. With a decay per channel this is gated linear
attention (GLA, arXiv 2312.06635), with one per head lightning attention (Lightning Attention-2, arXiv 2401.04658) or
the scalar gate of Mamba-2 (arXiv 2405.21060). A chunk's tokens attend to each other through a small matrix of scores
(intra-chunk) and to everything before through the state (inter-chunk).

Departs from the papers: no exponential of a positive number is taken, and no weight comes from the difference of two
running sums. GLA divides keys by the running decay, which overflows beyond about -88 in sum.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.decode.new_tokens import check_range
from decodax.kernels_pallas.linear_attention import reference
from decodax.kernels_pallas.linear_attention.reference import linear_attention_step
from decodax.kernels_pallas.selection import Implementation, KernelSelection, select_in_folder

__all__ = ["linear_attention", "linear_attention_step", "select_linear_attention"]


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N I"],
    log_decay: Float[Array, "B T N H"] | Float[Array, "B T N 1"],
    state: Float[Array, "B N H I"] | None,
    *,
    scale: float,
    length: Int[Array, " B"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B N H I"]]:
    """The outputs of T tokens (in query's dtype) and the state after them (float32).

    query, key, value: of the tokens.
    log_decay: natural logarithm of the decay, at most 0; -inf forgets everything before the token.
    state: float32, after the tokens before these; None: zeros.
    scale: of the outputs.
    length: existing tokens per row, T by default; the others change no state and give zeros, whatever they hold.
    implementation: None takes the kernel of this device if it supports the operands, else XLA.

    Raises ValueError for operands that do not fit each other, a state that is not float32, and (if values are known,
    that is outside jit) for a positive log_decay or lengths outside 0..T.
    Raises NotImplementedError if the implementation asked for does not support the operands.
    """
    _check_shapes(query, key, value, log_decay, state, length)
    _check_values(log_decay, length, query.shape[1])
    batch, num_tokens, num_heads, key_size = query.shape
    selection = select_linear_attention(query, key, value, log_decay, implementation=implementation)
    if state is None:
        state = jnp.zeros((batch, num_heads, key_size, value.shape[-1]), jnp.float32)
    if length is None:
        length = jnp.full((batch,), num_tokens, jnp.int32)
    length = jnp.clip(length.astype(jnp.int32), 0, num_tokens)
    operands = query, key, value, log_decay, state, length
    with jax.named_scope("linear_attention"):
        if selection.backend == "tpu":
            from decodax.kernels_pallas.linear_attention import kernel_tpu

            return kernel_tpu.linear_attention(*operands, scale=scale, interpret=selection.interpret)
        if selection.backend == "gpu":
            from decodax.kernels_pallas.linear_attention import kernel_gpu

            return kernel_gpu.linear_attention(*operands, scale=scale, interpret=selection.interpret)
        return reference.linear_attention(*operands, scale=scale)


def select_linear_attention(
    query: Any, key: Any, value: Any, log_decay: Any, *, implementation: Implementation | None = None
) -> KernelSelection:
    """The implementation of `linear_attention` for operands of these shapes and dtypes, and the reason."""
    return select_in_folder("linear_attention", implementation, query, key, value, log_decay)


def _check_shapes(query: Any, key: Any, value: Any, log_decay: Any, state: Any, length: Any) -> None:
    if query.ndim != 4 or key.shape != query.shape or value.shape[:3] != query.shape[:3] or value.ndim != 4:
        raise ValueError(
            "queries and keys must be [B, T, N, H] and values [B, T, N, I] with the same B, T and N, "
            f"got {query.shape}, {key.shape} and {value.shape}; repeat keys that several heads share"
        )
    if 0 in query.shape or value.shape[3] == 0:
        raise ValueError(f"there must be a row, a token, a head and a channel, got {query.shape} and {value.shape}")
    if log_decay.ndim != 4 or log_decay.shape[:3] != query.shape[:3] or log_decay.shape[3] not in (1, query.shape[3]):
        raise ValueError(
            f"log_decay must be {(*query.shape[:3], 1)} (one per head) or {query.shape} (one per channel of the keys), "
            f"got {log_decay.shape}"
        )
    state_shape = (query.shape[0], query.shape[2], query.shape[3], value.shape[3])
    if state is not None and state.shape != state_shape:
        raise ValueError(f"state must be [B, N, H, I] = {state_shape}, got {state.shape}")
    if state is not None and state.dtype != jnp.float32:
        raise ValueError(f"state must be float32, got {state.dtype}: it sums up all tokens; rounded, it stops growing")
    if length is not None and length.shape != query.shape[:1]:
        raise ValueError(f"length must have one entry per row, {query.shape[:1]}, got {length.shape}")


def _check_values(log_decay: jax.Array, length: jax.Array | None, num_tokens: int) -> None:
    if length is not None:
        check_range("length", length, 0, num_tokens, "the row has no more tokens (T)")
    if isinstance(log_decay, Tracer) or isinstance(length, Tracer):
        return
    exists = True if length is None else (jnp.arange(num_tokens)[None] < length[:, None])[:, :, None, None]
    if jnp.any((log_decay > 0) & exists):
        raise ValueError(
            "log_decay must be at most 0 (the natural logarithm of a decay of at most 1), got "
            f"{float(jnp.max(jnp.where(exists, log_decay, -jnp.inf)))}; pass jnp.log(decay) for a decay"
        )
