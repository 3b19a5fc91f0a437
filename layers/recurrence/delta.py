"""The gated delta rule over new tokens: a token, a chain or a tree of them, behind a state.

    u_t = beta_t (v_t - k_t a_t S_{t-1})        S_t = a_t S_{t-1} + k_t^T u_t        o_t = scale q_t S_t

Before a token is written, what the state holds under its key is taken out (the delta rule): with beta 1 its value is
replaced. Gated Delta Networks, arXiv 2412.06464. Once the corrected values u are known, this is linear attention with
decay a = exp(log_decay). Within a block of tokens they solve a triangular system, (I + A) u = beta (v - k [decayed S]),
where A_ij = beta_i (k_i . k_j) [what is left of j for i] for the j that i reads before itself: in a chain all before
it, in a tree its ancestors. Tokens staged in front have their u already.

Departs from the paper: u stands for both of its WY factors (the state is known when a block is solved), and the decays
are sums of exactly their terms (`block.py`). Decays may differ per channel (Kimi Linear, arXiv 2510.26692).
"""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Float32, Int

from decodax.kernels_pallas.linear_attention.reference import FORGOTTEN
from decodax.layers.attention.mask import Mask
from decodax.layers.recurrence.block import (
    Decays,
    Past,
    broken_before,
    decays,
    decays_of_chain,
    from_state,
    is_sound,
    mixed,
    scores,
    spoilt,
    without,
)

CHUNK_TOKENS = 32  # on a CPU 16 is as fast; 64 takes a third longer, 128 twice as long (Qwen3-Next's sizes)


def delta_recurrence(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N I"],
    log_decay: Float32[Array, "B T N _"],
    beta: Float32[Array, "B T N"],
    position: Int[Array, "B T"],
    mask: Mask,
    past: Past,
    *,
    scale: float,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N I"]]:
    """What each new token reads, as in `linear_recurrence`, and the corrected values that it will add to the state.

    A broken token (NaN or infinite) breaks those that read it, and nobody else. A node has to stand behind its
    ancestors, as masks promise.
    """
    dtype, state = query.dtype, past.cache.state
    query = query.astype(jnp.float32) * scale
    log_decay = jnp.maximum(log_decay, FORGOTTEN)
    step = beta[..., None]
    with jax.named_scope("delta_rule"):
        if past.is_chain(mask) and query.shape[1] == 1:
            output, corrected = _one_token(query, key, value, log_decay, step, state)
            return output.astype(dtype), corrected.astype(dtype)
        broken = ~is_sound(key, value, log_decay, step)
        own = without(broken, key, value, log_decay, step)
        if past.is_chain(mask):
            output, corrected = _chain(query, own, state)
            reads_broken = broken_before(broken)
        else:
            reads, key_position = past.reads(position, mask)
            output, corrected, broken = _tree(query, own, broken, reads, key_position, past)
            reads_broken = jnp.any(reads & broken[:, None], axis=2)
        return spoilt(reads_broken, output.astype(dtype)), spoilt(reads_broken, corrected.astype(dtype))


def _one_token(query, key, value, log_decay, step, state) -> tuple[Array, Array]:
    """Two products with the state, and none with a state that is written: `commit` does that."""
    decay = jnp.exp(log_decay)
    corrected = step * (value.astype(jnp.float32) - from_state(key, decay, state))
    own = jnp.sum(query * key.astype(jnp.float32), axis=3, keepdims=True)
    return from_state(query, decay, state) + own * corrected, corrected


def _corrected(
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N I"],
    step: Float32[Array, "B T N 1"],
    left: Decays,
    state: Float32[Array, "B N H I"],
) -> Float32[Array, "B T N I"]:
    """The solution u; `left` is what is left of these tokens and of the state for these tokens."""
    target = value.astype(jnp.float32) - from_state(key, left.of_state, state)
    step = jnp.moveaxis(step, 2, 1)
    matrix = jnp.tril(scores(key, key, left.of_token) * step, -1)
    target = step * jnp.moveaxis(target, 2, 1)
    solved = jax.lax.linalg.triangular_solve(matrix, target, left_side=True, lower=True, unit_diagonal=True)
    return jnp.moveaxis(solved, 1, 2)


def _tree(query, own, broken, reads, key_position, past: Past) -> tuple[Array, Array, Array]:
    """Also says which of the staged and the new tokens are broken."""
    key, value, log_decay, step = own
    state, rows = past.cache.state, past.rows
    if rows is None:
        left = decays(log_decay, reads, key_position)
        corrected = _corrected(key, value, step, left, state)
        return mixed(query, key, corrected, left, state), corrected, broken
    staged = rows.key, rows.value, jnp.maximum(rows.log_decay, FORGOTTEN)
    staged_broken = ~is_sound(*staged)
    staged_key, staged_value, staged_decay = without(staged_broken, *staged)
    staged_value = staged_value.astype(jnp.float32)
    left = decays(jnp.concatenate([staged_decay, log_decay], axis=1), reads, key_position)
    of_staged, of_own = jnp.split(left.of_token, (staged_key.shape[1],), axis=3)
    score = scores(key, staged_key, of_staged)
    held = jnp.einsum("bnij,bjnv->binv", score, staged_value, precision=Precision.HIGHEST)
    corrected = _corrected(key, value.astype(jnp.float32) - held, step, Decays(of_own, left.of_state), state)
    keys = jnp.concatenate([staged_key.astype(key.dtype), key], axis=1)
    values = jnp.concatenate([staged_value, corrected], axis=1)
    return mixed(query, keys, values, left, state), corrected, jnp.concatenate([staged_broken, broken], axis=1)


def _chain(query, own, state) -> tuple[Array, Array]:
    """Chunk by chunk: within one a triangular system, from one to the next the state."""
    num_tokens = query.shape[1]
    chunk = min(CHUNK_TOKENS, num_tokens)
    num_chunks = -(-num_tokens // chunk)

    def chunked(tokens: Array) -> Array:
        """[chunks, B, chunk, N, _]; padded with tokens that change nothing."""
        tokens = jnp.pad(tokens, ((0, 0), (0, num_chunks * chunk - num_tokens), (0, 0), (0, 0)))
        return jnp.moveaxis(tokens.reshape(tokens.shape[0], num_chunks, chunk, *tokens.shape[2:]), 1, 0)

    def run(state, tokens):
        query, key, value, log_decay, step = tokens
        left = decays_of_chain(log_decay)
        corrected = _corrected(key, value, step, left, state)
        output = mixed(query, key, corrected, left, state)
        to_end = jnp.moveaxis(left.of_token[:, :, -1], 1, 2)
        added = jnp.einsum("bjnh,bjnv->bnhv", key.astype(jnp.float32) * to_end, corrected, precision=Precision.HIGHEST)
        return state * left.of_state[:, -1, :, :, None] + added, (output, corrected)

    operands = tuple(map(chunked, (query, *own)))
    _, results = jax.lax.scan(run, state, operands)

    def joined(tokens: Array) -> Array:
        tokens = jnp.moveaxis(tokens, 0, 1)
        return tokens.reshape(tokens.shape[0], -1, *tokens.shape[3:])[:, :num_tokens]

    return joined(results[0]), joined(results[1])
