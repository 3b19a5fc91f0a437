"""Drafts the tokens that followed the row's last n-gram earlier in its text (prompt lookup decoding).

Costs no forward and needs no training; pays where the output repeats its input (edits, summaries, code). Paper: the
matching of Inference with Reference: Lossless Acceleration of Large Language Models, arXiv 2304.04487, on prompt and
output alone, known as prompt lookup decoding. Of several matches the latest is taken, not the first.
"""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from decodax.decoding.drafters._size import set_chain
from decodax.decoding.drafters.contract import Drafter, Proposal, fixed_proposal
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree


@dataclass(frozen=True)
class PromptLookup(Drafter):
    """A chain of the tokens after the latest earlier occurrence of the row's last n tokens. Keeps no state.

    n is the largest of max_ngram .. min_ngram that occurs; where none does, nothing is proposed. With the text 7 8 9 7
    8, the last two tokens occur at the start, and 9 7 8 is proposed.

    num_tokens: of a draft, at most.
    max_ngram, min_ngram: bounds of n.
    Raises ValueError for lengths below 1 and for an n-gram range that is empty.
    """

    num_tokens: int
    max_ngram: int = 3
    min_ngram: int = 1
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    def __post_init__(self) -> None:
        set_chain(self, self.num_tokens)
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(
                f"n-grams need 1 <= min_ngram <= max_ngram (tokens), got {self.min_ngram} and {self.max_ngram}"
            )

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Any]:
        num_matching, end = latest_match(state.tokens, state.length, self.max_ngram)
        position = end[:, None] + jnp.arange(self.num_nodes, dtype=jnp.int32)[None, :]
        is_known = (num_matching[:, None] >= self.min_ngram) & (position < state.length[:, None])
        token = jnp.take_along_axis(state.tokens, jnp.minimum(position, state.tokens.shape[1] - 1), axis=1)
        token = jnp.where(is_known, token, 0).at[:, 0].set(state.last_token())
        return fixed_proposal(Tree.chain(self.num_nodes), token, is_known), state.draft


def latest_match(
    tokens: Int[Array, "B S"], length: Int[Array, " B"], max_ngram: int
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many of a row's last tokens (at most `max_ngram`) occur together earlier in it, and where that match ends.

    Of equally long matches the latest is taken. Where 0 tokens match, the end has no meaning.
    """
    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    is_earlier = position < length[:, None] - 1
    matches, num_matching = is_earlier, jnp.zeros(tokens.shape, jnp.int32)
    for back in range(max_ngram):
        last = jnp.take_along_axis(tokens, jnp.maximum(length[:, None] - 1 - back, 0), axis=1)
        found = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
        matches = matches & (found == last) & (position >= back)
        num_matching = num_matching + matches.astype(jnp.int32)
    longest = jnp.max(num_matching, axis=1)
    end = jnp.max(jnp.where(num_matching == longest[:, None], position, 0), axis=1)
    return longest, end
