"""Computes the gated delta rule over new tokens after a state: one token, a chain or a tree.

    u_t = beta_t (v_t - k_t a_t S_{t-1})        S_t = a_t S_{t-1} + k_t^T u_t        o_t = scale q_t S_t

Before a token is written, the value that the state holds for its key is removed (the delta rule): with beta 1 it is
replaced. Gated Delta Networks, arXiv 2412.06464. Given the corrected values u, this is linear attention with decay
a = exp(log_decay). Within a block of tokens u solves a triangular system, (I + A) u = beta (v - k [decayed S]), where
A_ij = beta_i (k_i . k_j) [decay of j for i] for the j that i reads before itself: in a chain all tokens before it, in a
tree its ancestors. Staged tokens before them have their u already.

Departs from the paper: u replaces both of its WY factors (the state is known when a block is solved), and the decays
are sums of exactly their own terms (`block.py`). Decays may differ per channel (Kimi Linear, arXiv 2510.26692).
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
    decays,
    decays_of_chain,
    from_state,
    is_finite,
    mixed,
    nonfinite_before,
    propagate_nonfinite,
    scores,
    zeroed,
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
    """The output of each new token, as in `linear_recurrence`, and the corrected values for the cache update.

    A non-finite token (NaN or infinity) makes the outputs of the tokens that read it NaN, and no others. A node must
    be after its ancestors, as masks guarantee.

    query, key, value: of the new tokens.
    log_decay: per head, or per channel of the keys.
    beta: per head.
    position: of the new tokens.
    mask: which of the staged and new tokens each new one reads.
    past: the state and the staged tokens.
    scale: multiplies the queries.
    """
    dtype, state = query.dtype, past.cache.state
    query = query.astype(jnp.float32) * scale
    log_decay = jnp.maximum(log_decay, FORGOTTEN)
    step = beta[..., None]
    with jax.named_scope("delta_rule"):
        if past.is_chain(mask) and query.shape[1] == 1:
            output, corrected = _one_token(query, key, value, log_decay, step, state)
            return output.astype(dtype), corrected.astype(dtype)
        nonfinite = ~is_finite(key, value, log_decay, step)
        own = zeroed(nonfinite, key, value, log_decay, step)
        if past.is_chain(mask):
            output, corrected = _chain(query, own, state)
            reads_nonfinite = nonfinite_before(nonfinite)
        else:
            reads, key_position = past.reads(position, mask)
            output, corrected, nonfinite = _tree(query, own, nonfinite, reads, key_position, past)
            reads_nonfinite = jnp.any(reads & nonfinite[:, None], axis=2)
        return propagate_nonfinite(reads_nonfinite, output.astype(dtype)), propagate_nonfinite(
            reads_nonfinite, corrected.astype(dtype)
        )


def _one_token(query, key, value, log_decay, step, state) -> tuple[Array, Array]:
    """Two products with the state, which is not written here: `commit` does that."""
    decay = jnp.exp(log_decay)
    corrected = step * (value.astype(jnp.float32) - from_state(key, decay, state))
    own = jnp.sum(query * key.astype(jnp.float32), axis=3, keepdims=True)
    return from_state(query, decay, state) + own * corrected, corrected


def _corrected(
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N I"],
    step: Float32[Array, "B T N 1"],
    decay: Decays,
    state: Float32[Array, "B N H I"],
) -> Float32[Array, "B T N I"]:
    """The corrected values u.

    key, value: of the block's tokens.
    step: their beta.
    decay: of these tokens and of the state, for these tokens.
    state: before them.
    """
    target = value.astype(jnp.float32) - from_state(key, decay.of_state, state)
    step = jnp.moveaxis(step, 2, 1)
    matrix = jnp.tril(scores(key, key, decay.of_token) * step, -1)
    target = step * jnp.moveaxis(target, 2, 1)
    solved = jax.lax.linalg.triangular_solve(matrix, target, left_side=True, lower=True, unit_diagonal=True)
    return jnp.moveaxis(solved, 1, 2)


def _tree(query, own, nonfinite, reads, key_position, past: Past) -> tuple[Array, Array, Array]:
    """Also returns which of the staged and the new tokens are non-finite."""
    key, value, log_decay, step = own
    state, update = past.cache.state, past.update
    if update is None:
        decay = decays(log_decay, reads, key_position)
        corrected = _corrected(key, value, step, decay, state)
        return mixed(query, key, corrected, decay, state), corrected, nonfinite
    staged = update.key, update.value, jnp.maximum(update.log_decay, FORGOTTEN)
    staged_nonfinite = ~is_finite(*staged)
    staged_key, staged_value, staged_decay = zeroed(staged_nonfinite, *staged)
    staged_value = staged_value.astype(jnp.float32)
    decay = decays(jnp.concatenate([staged_decay, log_decay], axis=1), reads, key_position)
    of_staged, of_own = jnp.split(decay.of_token, (staged_key.shape[1],), axis=3)
    score = scores(key, staged_key, of_staged)
    held = jnp.einsum("bnij,bjnv->binv", score, staged_value, precision=Precision.HIGHEST)
    corrected = _corrected(key, value.astype(jnp.float32) - held, step, Decays(of_own, decay.of_state), state)
    keys = jnp.concatenate([staged_key.astype(key.dtype), key], axis=1)
    values = jnp.concatenate([staged_value, corrected], axis=1)
    return mixed(query, keys, values, decay, state), corrected, jnp.concatenate([staged_nonfinite, nonfinite], axis=1)


def _chain(query, own, state) -> tuple[Array, Array]:
    """Chunk by chunk: a triangular system within a chunk, and the state from one chunk to the next."""
    num_tokens = query.shape[1]
    chunk = min(CHUNK_TOKENS, num_tokens)
    num_chunks = -(-num_tokens // chunk)

    def chunked(tokens: Array) -> Array:
        """[chunks, B, chunk, N, _]; padded with tokens that change nothing."""
        tokens = jnp.pad(tokens, ((0, 0), (0, num_chunks * chunk - num_tokens), (0, 0), (0, 0)))
        return jnp.moveaxis(tokens.reshape(tokens.shape[0], num_chunks, chunk, *tokens.shape[2:]), 1, 0)

    def run(state, tokens):
        query, key, value, log_decay, step = tokens
        decay = decays_of_chain(log_decay)
        corrected = _corrected(key, value, step, decay, state)
        output = mixed(query, key, corrected, decay, state)
        to_end = jnp.moveaxis(decay.of_token[:, :, -1], 1, 2)
        added = jnp.einsum("bjnh,bjnv->bnhv", key.astype(jnp.float32) * to_end, corrected, precision=Precision.HIGHEST)
        return state * decay.of_state[:, -1, :, :, None] + added, (output, corrected)

    operands = tuple(map(chunked, (query, *own)))
    _, results = jax.lax.scan(run, state, operands)

    def unchunked(tokens: Array) -> Array:
        tokens = jnp.moveaxis(tokens, 0, 1)
        return tokens.reshape(tokens.shape[0], -1, *tokens.shape[3:])[:, :num_tokens]

    return unchunked(results[0]), unchunked(results[1])
