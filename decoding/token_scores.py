"""Computes the log-probability of given tokens, and whether each is the argmax, in chunks over KV caches.

    scores = token_scores(model, params, rows)

Chunks run as in prefill. Logits are made for a few positions at a time, as those of a long text would be larger than
the model, and for none where no row has a token to score.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core import pytree
from decodax.decoding.chunked_prefill import MAX_CHUNK_TOKENS, chunk_of, commit_finite
from decodax.decoding.continuations import Continuation
from decodax.decoding.programs import bounded_jit
from decodax.decoding.sampling import token_logprob
from decodax.decoding.sizes import cache_capacity, check_cache_fits, chunk_tokens
from decodax.decoding.top_tokens import argmax_token
from decodax.models.model import Model, Params
from decodax.sharding.host import to_host

LOGITS_BYTES = 2**26  # of the float32 logits that exist at a time on a device


class TokenScores(NamedTuple):
    """What the model says of the last n tokens of a row, those to score.

    logprob: float32 [n], NaN from where the model's numbers are not finite.
    is_argmax: bool [n], whether the token has the largest logit.
    """

    logprob: np.ndarray
    is_argmax: np.ndarray


@pytree.dataclass
class ScoringState:
    """What passes from chunk to chunk.

    failed: rows whose hidden states became NaN or infinite; nothing more is written for them.
    """

    caches: tuple[Any, ...]
    failed: Bool[Array, " B"]


def token_scores(model: Model, params: Params, rows: Sequence[Continuation], batch_size: int) -> list[TokenScores]:
    """The scores of the tokens from `first` on of each row, all rows as one batch.

    Buffers and chunks have bucketed sizes, and the number of rows is filled up to a power of two or to `batch_size`, so
    that batches of similar sizes share compiled code.
    Raises MemoryError when the cache would not fit on the device.
    """
    longest, batch = max(len(row.tokens) for row in rows), min(1 << (len(rows) - 1).bit_length(), batch_size)
    capacity, dtype = cache_capacity(longest, model.execution), model.dtype(params)
    check_cache_fits(model, batch, capacity, dtype, remedy="use fewer rows at a time (batch_size)")
    tokens, length, first = np.zeros((batch, capacity), np.int32), np.ones(batch, np.int32), np.ones(batch, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)], length[index], first[index] = row.tokens, len(row.tokens), row.first
    state, found, start = empty_scoring_state(model, batch, capacity, dtype), [], 0
    while start < longest - 1:
        chunk = chunk_tokens(longest - 1 - start, MAX_CHUNK_TOKENS, model.execution)
        block = block_tokens(model, batch, chunk)
        state, *scores = score_chunk(model, chunk, block, params, state, tokens, length, first, start)
        found.append(scores)
        start += chunk
    logprob, is_argmax = (np.concatenate(parts, axis=1) for parts in zip(*to_host(found), strict=True))
    return [  # what a position says is of the token after it
        TokenScores(logprob[index, row.first - 1 : end], is_argmax[index, row.first - 1 : end])
        for index, row in enumerate(rows)
        for end in [len(row.tokens) - 1]
    ]


@bounded_jit(static_argnums=(0, 1, 2, 3))
def empty_scoring_state(model: Model, batch: int, capacity: int, dtype: DTypeLike) -> ScoringState:
    """The state before the first chunk, sharded for the mesh."""
    return model.execution.constrained(ScoringState(model.empty_cache(batch, capacity, dtype), jnp.zeros(batch, bool)))


@bounded_jit(static_argnums=(0, 1, 2), donate_argnums=(4,))
def score_chunk(
    model: Model,
    chunk: int,
    block: int,
    params: Params,
    state: ScoringState,
    tokens: Int[Array, "B S"],
    length: Int[Array, " B"],
    first: Int[Array, " B"],
    start: Int[Array, ""] | int,
) -> tuple[ScoringState, Float32[Array, "B T"], Bool[Array, "B T"]]:
    """Runs tokens start .. start + chunk - 1 of every row, and scores the token after each of them.

    block: for how many positions there are logits at a time, a divisor of `chunk` (`block_tokens`).
    tokens, length: every row's buffer, and how much of it is filled.
    first: the index of the first token to score; before it and after the row's end, scores have no meaning.
    The state is donated.
    """
    window, position = chunk_of(tokens, start, chunk)
    target, _ = chunk_of(tokens, start + 1, chunk)
    out = model.apply(params, window, position, state.caches, row_length=length[:, None])
    caches, finite = commit_finite(state.caches, out.cache_updates, out.hidden, length, start, skip=state.failed)
    is_scored = (position + 1 >= first[:, None]) & (position + 1 < length[:, None])
    logprob, is_argmax = _scores(model, block, params, out.hidden, target, is_scored)
    failed = state.failed | ~finite
    is_valid = jnp.isfinite(logprob) & ~failed[:, None]
    after = model.execution.constrained(ScoringState(caches, failed))
    return after, jnp.where(is_valid, logprob, jnp.nan), is_argmax & is_valid


def _scores(
    model: Model,
    block: int,
    params: Params,
    hidden: Float[Array, "B T D"],
    target: Int[Array, "B T"],
    is_scored: Bool[Array, "B T"],
) -> tuple[Float32[Array, "B T"], Bool[Array, "B T"]]:
    """log-probability of each target and whether it is the argmax, a block of positions after the other."""
    batch, chunk = target.shape
    num_blocks, num_shards = chunk // block, model.execution.num_shards("T", chunk)

    def in_blocks(array: Array) -> Array:
        """[blocks, B, T of a block, ...]: each block has as many tokens of every device."""
        parts = array.reshape(batch, num_shards, num_blocks, -1, *array.shape[2:])
        return jnp.moveaxis(parts, 2, 0).reshape(num_blocks, batch, -1, *array.shape[2:])

    def of_block(inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, target, is_scored = inputs

        def compute() -> tuple[Array, Array]:
            logits = model.logits(params, hidden)
            best = argmax_token(logits.reshape(-1, logits.shape[-1])).reshape(target.shape)
            return token_logprob(logits, target), best == target

        def skip() -> tuple[Array, Array]:
            return jnp.zeros(target.shape, jnp.float32), jnp.zeros(target.shape, bool)

        return jax.lax.cond(jnp.any(is_scored), compute, skip)

    def in_order(blocks: Array) -> Array:
        parts = blocks.reshape(num_blocks, batch, num_shards, -1)
        return jnp.moveaxis(parts, 0, 2).reshape(batch, chunk)

    with jax.named_scope("score"):
        blocks = jax.lax.map(of_block, (in_blocks(hidden), in_blocks(target), in_blocks(is_scored)))
        return in_order(blocks[0]), in_order(blocks[1])


def block_tokens(model: Model, batch: int, chunk: int) -> int:
    """For how many of a chunk's positions there are logits at a time: a divisor, with as many tokens on each device."""
    execution, vocab_size = model.execution, model.vocab_size
    num_shards = execution.num_shards("T", chunk)
    of_one = 4 * batch * vocab_size // (execution.num_shards("B", batch) * execution.num_shards("V", vocab_size))
    most, num_tokens = max(1, LOGITS_BYTES // of_one), chunk // num_shards
    return num_shards * max(count for count in range(1, min(most, num_tokens) + 1) if num_tokens % count == 0)
