"""Linear attention with decay over new tokens: a token, a chain or a tree of them, behind a state.

    S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

Gated Linear Attention, arXiv 2312.06635; Lightning Attention-2, arXiv 2401.04658. Chains run chunk by chunk in
`kernels_pallas/linear_attention`; a tree is one block in which a node reads its ancestors. The state itself is left
to the cache's `commit`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.kernels_pallas.choice import Choice, choose
from decodax.kernels_pallas.linear_attention import choose_linear_attention, linear_attention, linear_attention_step
from decodax.kernels_pallas.linear_attention.reference import FORGOTTEN
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import Execution
from decodax.layers.recurrence.block import Past, broken_before, decays, is_sound, mixed, spoilt, without


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
    """What each new token reads of itself, of the new tokens that the mask lets it read, and of the past.

    Every token of the cache is read, whatever the mask says of them: a state cannot leave any out. A broken token (NaN
    or infinite) breaks those that read it, and nobody else.

    Raises NotImplementedError if `execution` asks for a kernel that does not take these operands.
    """
    output = _recurrence(query, key, value, log_decay, position, mask, past, scale, execution)
    return execution.all_tokens(output)


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
        if past.rows is not None:
            rows = past.rows
            key = jnp.concatenate([rows.key.astype(key.dtype), key], axis=1)
            value = jnp.concatenate([rows.value.astype(value.dtype), value], axis=1)
            log_decay = jnp.concatenate([rows.log_decay, log_decay], axis=1)
        log_decay = jnp.maximum(log_decay, FORGOTTEN)
        broken = ~is_sound(key, value, log_decay)
        key, value, log_decay = without(broken, key, value, log_decay)
        left = decays(log_decay, reads, key_position)
        output = mixed(query.astype(jnp.float32) * scale, key, value, left, state).astype(query.dtype)
        return spoilt(jnp.any(reads & broken[:, None], axis=2), output)


def _chain(query, key, value, log_decay, state, scale: float, execution: Execution) -> Float[Array, "B T N I"]:
    log_decay = jnp.maximum(log_decay, FORGOTTEN)
    broken = ~is_sound(key, value, log_decay)
    key, value, log_decay = without(broken, key, value, log_decay)
    choice = choose_chain(query, key, value, log_decay, execution)

    def run(*operands: Array) -> tuple[Array, Array]:
        return linear_attention(*operands, scale=scale, implementation=choice.implementation)

    if choice.backend != "xla":
        tokens, states = "B T N H", "B N H I"
        run = execution.per_device(run, (tokens, tokens, tokens, tokens, states), (tokens, states))
    output, _ = run(query, key, value, log_decay, state)
    return spoilt(broken_before(broken), output)


def choose_chain(query: Any, key: Any, value: Any, log_decay: Any, execution: Execution) -> Choice:
    """What runs a chain of several tokens (arrays or their shapes), and why.

    Raises NotImplementedError if `execution` asks for a kernel that does not take the operands.
    """
    num_parts = execution.num_parts("N")
    if query.shape[2] % num_parts:
        misfit = f"{query.shape[2]} heads do not divide over {num_parts} devices"
        return choose("linear_attention", execution.implementation, lambda backend: misfit)

    def part(operand: Any) -> jax.ShapeDtypeStruct:
        shape = list(operand.shape)
        shape[2] //= num_parts
        return jax.ShapeDtypeStruct(tuple(shape), operand.dtype)

    operands = (part(operand) for operand in (query, key, value, log_decay))
    return choose_linear_attention(*operands, implementation=execution.implementation)
