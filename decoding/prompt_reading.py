"""Prompts are read in chunks: each is run, checked, and committed to the caches, up to the last token of a row.

What runs a chunk is a function, so that a model, its first layers with an adapter, or a stack with layers left out all
read in the same way.
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.models.model import Model, Params, commit

DRAFT_CHUNK_TOKENS = 128  # prompt tokens that a drafter reads per forward


@runtime_checkable
class PromptRun(Protocol):
    """Runs T tokens per row, row_length[b] being all that row b will have, pending token included.

    Gives the rows for `caches`, and a witness: vectors that are finite where the token could be run soundly.
    """

    def __call__(
        self,
        caches: tuple[Any, ...],
        tokens: Int[Array, "B T"],
        position: Int[Array, "B T"],
        row_length: Int[Array, "B 1"],
    ) -> tuple[tuple[Any, ...], Float[Array, "B T D"]]: ...


def all_layers(model: Model, params: Params) -> PromptRun:
    """Runs a whole model. The last layer's output is not needed, so its input is the witness; of stages, the output."""
    last = model.config.num_layers - (1 if model.stages is None else 0)

    def run(caches, tokens, position, row_length):
        out = model.apply(params, tokens, position, caches, row_length=row_length, capture=(last,))
        return out.rows, out.captured[last]

    return run


def is_read(length: Int[Array, " B"], start: Int[Array, ""], chunk: int) -> Bool[Array, "B T"]:
    """Which of the tokens start .. start + chunk - 1 belong to a row's prompt and are not its last, pending one."""
    return start + jnp.arange(chunk, dtype=jnp.int32)[None, :] < length[:, None] - 1


def read_chunk(
    run: PromptRun,
    caches: tuple[Any, ...],
    tokens: Int[Array, "B S"],
    length: Int[Array, " B"],
    start: Int[Array, ""],
    chunk: int,
    *,
    skip: Bool[Array, " B"],
) -> tuple[tuple[Any, ...], Bool[Array, " B"]]:
    """The caches after tokens start .. start + chunk - 1 of every row, of which those before its last are committed.

    Also says which rows are sound (finite); the others, and those to `skip`, get nothing written.
    """
    offset = start + jnp.arange(chunk, dtype=jnp.int32)
    # A chunk may reach past the buffer; those columns repeat the last one and are not committed.
    window = jnp.take(tokens, jnp.minimum(offset, tokens.shape[1] - 1), axis=1)
    position = jnp.broadcast_to(offset, window.shape)
    rows, witness = run(caches, window, position, jnp.maximum(length[:, None], 1))
    read = is_read(length, start, chunk)
    sound = jnp.all(jnp.isfinite(witness) | ~read[..., None], axis=(1, 2))
    # As the count depends on what was run, the caches are written in place (see KVCache.commit).
    count = jnp.where(sound & ~skip, jnp.sum(read, axis=1, dtype=jnp.int32), 0)
    return commit(caches, rows, count), sound


def read_prompt_chunks(
    run: PromptRun,
    caches: tuple[Any, ...],
    tokens: Int[Array, "B S"],
    length: Int[Array, " B"],
    *,
    skip: Bool[Array, " B"],
) -> tuple[Any, ...]:
    """The caches after reading all of every row but its last token, inside a compiled function: what drafts start with.

    One loop over chunks of DRAFT_CHUNK_TOKENS, as many as the longest row needs.
    """
    chunk = min(DRAFT_CHUNK_TOKENS, tokens.shape[1])

    def read(index: Array, caches: tuple[Any, ...]) -> tuple[Any, ...]:
        return read_chunk(run, caches, tokens, length, index * chunk, chunk, skip=skip)[0]

    num_chunks = (jnp.max(length) - 1 + chunk - 1) // chunk
    return jax.lax.fori_loop(0, num_chunks, read, caches)
