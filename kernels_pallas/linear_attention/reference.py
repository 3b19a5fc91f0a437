"""Computes linear attention with decay in plain JAX, where no kernel takes the operands: chunks, and a one-token step.

Gated linear attention (arXiv 2312.06635) and Lightning Attention-2 (arXiv 2401.04658). Within a chunk the weight of
token j for token i is exp(log_decay_{j+1} + ... + log_decay_i), from sums of exactly those terms: a difference of two
running sums, as in the papers, loses digits when the decay is strong, and exp of minus a running sum overflows.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Int

FORGOTTEN = -120.0  # log decays are raised to this: exp(-120) is 0 in float32, and -inf times 0 would be NaN
CHUNK_TOKENS = 64  # one decay per head
CHUNK_TOKENS_PER_CHANNEL = 16  # a decay per channel: chunk x chunk x H weights of a head exist at once


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N I"],
    log_decay: Float[Array, "B T N H"] | Float[Array, "B T N 1"],
    state: Float[Array, "B N H I"],
    length: Int[Array, " B"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B N H I"]]:
    """As the function of this name in `__init__.py`; it keeps copies of the operands in chunks, and one chunk's own."""
    num_tokens = query.shape[1]
    longest = CHUNK_TOKENS if log_decay.shape[-1] == 1 else CHUNK_TOKENS_PER_CHANNEL
    chunk_tokens = min(longest, num_tokens)
    num_chunks = -(-num_tokens // chunk_tokens)
    exists = jnp.arange(num_tokens)[None] < length[:, None]

    def chunked(tokens: Array) -> Array:
        """[chunks, B, N, chunk, H], zero where no token exists."""
        tokens = jnp.where(exists[:, :, None, None], tokens, jnp.zeros((), tokens.dtype))
        tokens = jnp.pad(tokens, ((0, 0), (0, num_chunks * chunk_tokens - num_tokens), (0, 0), (0, 0)))
        tokens = tokens.reshape(tokens.shape[0], num_chunks, chunk_tokens, *tokens.shape[2:])
        return tokens.transpose(1, 0, 3, 2, 4)

    operands = chunked(query), chunked(key), chunked(value), chunked(log_decay)
    state, output = jax.lax.scan(partial(_chunk, scale=scale), state, operands)
    output = output.transpose(1, 0, 3, 2, 4).reshape(-1, num_chunks * chunk_tokens, *value.shape[2:])
    return output[:, :num_tokens].astype(query.dtype), state


def _chunk(
    state: Float[Array, "B N H I"], operands: tuple[Float[Array, "B N chunk _"], ...], scale: float
) -> tuple[Float[Array, "B N H I"], Float[Array, "B N chunk I"]]:
    query, key, value, log_decay = (tokens.astype(jnp.float32) for tokens in operands)
    query = query * scale
    log_decay = jnp.maximum(log_decay, FORGOTTEN)
    reader, read = jnp.indices((query.shape[2], query.shape[2]))[:, None, None]
    # [i, j] sums the decays of the tokens after j up to i
    between = jnp.cumsum(jnp.where((reader > read)[..., None], log_decay[:, :, :, None], 0.0), axis=2)
    since_start = between[:, :, :, 0] + log_decay[:, :, :1]
    to_end = between[:, :, -1]
    if log_decay.shape[-1] == 1:
        score = jnp.einsum("bnih,bnjh->bnij", query, key, precision=Precision.HIGHEST) * jnp.exp(between[..., 0])
    else:
        score = jnp.sum(query[:, :, :, None] * key[:, :, None] * jnp.exp(between), axis=-1)
    score = jnp.where(reader >= read, score, 0.0)
    output = jnp.einsum("bnij,bnjv->bniv", score, value, precision=Precision.HIGHEST)
    output += jnp.einsum("bnih,bnhv->bniv", query * jnp.exp(since_start), state, precision=Precision.HIGHEST)
    added = jnp.einsum("bnjh,bnjv->bnhv", key * jnp.exp(to_end), value, precision=Precision.HIGHEST)
    return state * jnp.exp(since_start[:, :, -1])[..., None] + added, output


def linear_attention_step(
    query: Float[Array, "B N H"],
    key: Float[Array, "B N H"],
    value: Float[Array, "B N I"],
    log_decay: Float[Array, "B N H"] | Float[Array, "B N 1"],
    state: Float[Array, "B N H I"],
    *,
    scale: float,
) -> tuple[Float[Array, "B N I"], Float[Array, "B N H I"]]:
    """One token, with the shapes and dtypes of `linear_attention` less T.

    There is no kernel for it: XLA makes one loop that reads and writes the state once, which is the minimum. The sum
    over H is no dot, as a matrix unit would round the state, and could not be fused with its update.
    """
    with jax.named_scope("linear_attention_step"):
        query32, key32, value32 = (tokens.astype(jnp.float32) for tokens in (query, key, value))
        decay = jnp.exp(log_decay.astype(jnp.float32))[..., None]
        state = decay * state + key32[..., None] * value32[:, :, None]
        output = jnp.sum((query32 * scale)[..., None] * state, axis=2)
        return output.astype(query.dtype), state
