"""Computes linear attention with decay over new tokens after a state: one token, a chain or a tree.

    S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

Gated Linear Attention, arXiv 2312.06635; Lightning Attention-2, arXiv 2401.04658. Chains run chunk by chunk in
`kernels_pallas/linear_attention`; a tree is one block in which a node reads its ancestors. The cache's `commit` updates
the state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.kernels_pallas.linear_attention import linear_attention, linear_attention_step, select_linear_attention
from decodax.kernels_pallas.linear_attention.reference import FORGOTTEN
from decodax.kernels_pallas.selection import KernelSelection, select_kernel
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import Execution
from decodax.layers.recurrence.block import (
    Past,
    decays,
    is_finite,
    mixed,
    nonfinite_before,
    propagate_nonfinite,
    zeroed,
)


def linear_recurrence(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N I"],
    log_decay: Float32[Array, "B T N _"],
    position: Int[Array, "B T"],
    mask: Mask,
    past: Past,
    *,
    scale: float,
    execution: Execution,
) -> Float[Array, "B T N I"]:
    """The output of each new token: it reads itself, the new and staged tokens that the mask allows, and the state.

    Every cached token is read, whatever the mask says: a state cannot leave any out. A non-finite token (NaN or
    infinity) makes the outputs of the tokens that read it NaN, and no others.

    query, key, value: of the new tokens.
    log_decay: per head, or per channel of the keys.
    position: of the new tokens.
    mask: which of the staged and new tokens each new one reads.
    past: the state and the staged tokens.
    scale: multiplies the queries.
    execution: which kernel runs, over which devices.
    Raises NotImplementedError if `execution` asks for a kernel that does not support these operands.
    """
    output = _recurrence(query, key, value, log_decay, position, mask, past, scale, execution)
    return execution.gathered_tokens(output)


def _recurrence(
    query, key, value, log_decay, position, mask: Mask, past: Past, scale: float, execution: Execution
) -> Float[Array, "B T N I"]:
    state = past.cache.state
    if past.is_chain(mask):
        if query.shape[1] == 1:
            query, key, value, log_decay = (tokens[:, 0] for tokens in (query, key, value, log_decay))
            output, _ = linear_attention_step(query, key, value, log_decay, state, scale=scale)
            return output[:, None]
        return _chain(query, key, value, log_decay, state, scale, execution)
    with jax.named_scope("linear_recurrence_tree"):
        reads, key_position = past.reads(position, mask)
        if past.update is not None:
            update = past.update
            key = jnp.concatenate([update.key.astype(key.dtype), key], axis=1)
            value = jnp.concatenate([update.value.astype(value.dtype), value], axis=1)
            log_decay = jnp.concatenate([update.log_decay, log_decay], axis=1)
        log_decay = jnp.maximum(log_decay, FORGOTTEN)
        nonfinite = ~is_finite(key, value, log_decay)
        key, value, log_decay = zeroed(nonfinite, key, value, log_decay)
        decay = decays(log_decay, reads, key_position)
        output = mixed(query.astype(jnp.float32) * scale, key, value, decay, state).astype(query.dtype)
        return propagate_nonfinite(jnp.any(reads & nonfinite[:, None], axis=2), output)


def _chain(query, key, value, log_decay, state, scale: float, execution: Execution) -> Float[Array, "B T N I"]:
    log_decay = jnp.maximum(log_decay, FORGOTTEN)
    nonfinite = ~is_finite(key, value, log_decay)
    key, value, log_decay = zeroed(nonfinite, key, value, log_decay)
    selection = select_chain_kernel(query, key, value, log_decay, execution)

    def run(*operands: Array) -> tuple[Array, Array]:
        return linear_attention(*operands, scale=scale, implementation=selection.implementation)

    if selection.backend != "xla":
        tokens, states = "B T N H", "B N H I"
        run = execution.per_device(run, (tokens, tokens, tokens, tokens, states), (tokens, states))
    output, _ = run(query, key, value, log_decay, state)
    return propagate_nonfinite(nonfinite_before(nonfinite), output)


def select_chain_kernel(query: Any, key: Any, value: Any, log_decay: Any, execution: Execution) -> KernelSelection:
    """The kernel for a chain of several tokens, and why it was selected.

    query, key, value, log_decay: arrays or their shapes.
    execution: which kernel is requested, and the devices.
    Raises NotImplementedError if `execution` asks for a kernel that does not support the operands.
    """
    num_shards = execution.num_shards("N")
    if query.shape[2] % num_shards:
        unsupported_reason = f"{query.shape[2]} heads do not divide over {num_shards} devices"
        return select_kernel("linear_attention", execution.implementation, lambda backend: unsupported_reason)

    def shard(operand: Any) -> jax.ShapeDtypeStruct:
        shape = list(operand.shape)
        shape[2] //= num_shards
        return jax.ShapeDtypeStruct(tuple(shape), operand.dtype)

    operands = (shard(operand) for operand in (query, key, value, log_decay))
    return select_linear_attention(*operands, implementation=execution.implementation)
