"""Computes which keys a query attends to, and which key blocks a query block loads: the same for every backend.

A query attends to a key that exists, is no later than the query (causal), in its window or among the sink tokens
(StreamingLLM, arXiv 2309.17453), and in its segment (packed prompts). Queries and keys are counted in one order: query
t of a row is at index `offset + t` among its keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Rows(NamedTuple):
    """Values per row of a batch: index of query 0, number of keys, number of sink tokens."""

    offset: Int[Array, " B"]
    length: Int[Array, " B"]
    num_sink_tokens: Int[Array, " B"]


class Segments(NamedTuple):
    """The prompt of each token, if several are packed into a row."""

    query: Int[Array, "B T"]
    key: Int[Array, "B S"]


class Rules(NamedTuple):
    """The mask's rules, the same for all rows."""

    causal: bool
    window: int | None

    def read(
        self,
        query: Int[Array, "*shape"],
        key: Int[Array, "*shape"],
        length: Int[Array, "*_"],
        num_sink_tokens: Int[Array, "*_"],
    ) -> Bool[Array, "*shape"]:
        """Whether a query attends to a key, apart from segments.

        query, key: indices.
        length, num_sink_tokens: of the row.
        """
        allowed = key < length
        if self.causal:
            allowed = allowed & (key <= query)
        if self.window is not None:
            allowed = allowed & ((key > query - self.window) | (key < num_sink_tokens))
        return allowed

    def read_all(
        self,
        queries: tuple[Int[Array, ""], Int[Array, ""]],
        keys: tuple[Int[Array, ""], Int[Array, ""]],
        length: Int[Array, ""],
    ) -> Bool[Array, ""]:
        """Whether all queries of a block attend to all keys of a block, so that it needs no mask.

        A block of sink tokens alone is not recognised as such.

        queries, keys: (first index, last index).
        length: of the row.
        """
        (first_query, last_query), (first_key, last_key) = queries, keys
        everything = last_key < length
        if self.causal:
            everything = everything & (last_key <= first_query)
        if self.window is not None:
            everything = everything & (first_key > last_query - self.window)
        return everything


class Blocks(NamedTuple):
    """The blocks of keys that each block of queries loads: sink tokens from 0 on, then a run up to its last key.

    num_steps: blocks to load.
    num_sink_blocks: blocks of sink tokens.
    skipped: blocks between those of the sink tokens and the run.
    """

    num_steps: Int[Array, "B blocks"]
    num_sink_blocks: Int[Array, "B blocks"]
    skipped: Int[Array, "B blocks"]

    @staticmethod
    def at(step: Array, num_sink_blocks: Array, skipped: Array) -> Array:
        """The block that is loaded in step `step`."""
        return step + jnp.where(step >= num_sink_blocks, skipped, 0)


def blocks_to_read(
    rows: Rows,
    segments: Segments | None,
    rules: Rules,
    *,
    num_queries: int,
    query_block: int,
    key_block: int,
) -> Blocks:
    """The blocks of keys that each block of queries has to load.

    rows, segments, rules: of the mask.
    num_queries: per row.
    query_block, key_block: tokens per block.
    """
    first_query = jnp.arange(0, num_queries, query_block, dtype=jnp.int32)[None, :]
    last_query = jnp.minimum(first_query + query_block, num_queries) - 1
    offset, length, num_sink_tokens = (x[:, None] for x in rows)
    start = jnp.zeros((offset.shape[0], first_query.shape[1]), jnp.int32)
    end = jnp.broadcast_to(length, start.shape)
    if rules.causal:
        end = jnp.clip(offset + last_query + 1, 0, end)
    if rules.window is not None:
        start = jnp.maximum(offset + first_query + 1 - rules.window, 0)
    if segments is not None:
        segments_start, segments_end = _keys_in_segments(segments, query_block)
        start, end = jnp.maximum(start, segments_start), jnp.minimum(end, segments_end)
    num_sink_blocks = jnp.zeros_like(start)
    if rules.window is not None:
        num_sink_blocks = -(-jnp.minimum(num_sink_tokens, end) // key_block)
    first = jnp.maximum(start // key_block, num_sink_blocks)
    run = jnp.where(start < end, jnp.maximum(-(-end // key_block) - first, 0), 0)
    return Blocks(num_sink_blocks + run, num_sink_blocks, first - num_sink_blocks)


def _keys_in_segments(segments: Segments, query_block: int) -> tuple[Int[Array, "B blocks"], Int[Array, "B blocks"]]:
    """The first key that a block of queries may share a segment with, and one after the last."""
    num_keys = segments.key.shape[1]
    padding = -segments.query.shape[1] % query_block
    blocks = jnp.pad(segments.query, ((0, 0), (0, padding)), mode="edge").reshape(len(segments.query), -1, query_block)
    lowest, highest = jnp.min(blocks, axis=2), jnp.max(blocks, axis=2)

    def bounds(block: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = block
        shared = (segments.key >= low[:, None]) & (segments.key <= high[:, None])
        index = jnp.arange(num_keys, dtype=jnp.int32)[None, :]
        return jnp.min(jnp.where(shared, index, num_keys), axis=1), jnp.max(jnp.where(shared, index + 1, 0), axis=1)

    start, end = jax.lax.map(bounds, (lowest.T, highest.T))
    return start.T, end.T
