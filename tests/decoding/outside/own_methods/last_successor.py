"""A drafter: every token is followed by what followed it the last time."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int

from decodax.core import pytree
from decodax.decoding import Tree
from decodax.decoding.drafters import Drafter, fixed_proposal


@pytree.dataclass
class Successors:
    """place[b, v]: the place after the last occurrence of token v in row b; 0: none."""

    place: Int[Array, "B V"]


@dataclass(frozen=True)
class LastSuccessor(Drafter):
    """A chain of `num_tokens` draft tokens; its state is `Successors`."""

    num_tokens: int
    vocab_size: int
    num_nodes = property(lambda self: self.num_tokens + 1)
    max_depth = property(lambda self: self.num_tokens)

    def start(self, params, draft_params, state):
        nowhere = jnp.zeros((len(state.tokens), self.vocab_size), jnp.int32)
        return self._note(nowhere, state, 1, state.tokens.shape[1])

    def propose(self, params, draft_params, state):
        tokens, known = [state.last_token()], []
        for _ in range(self.num_tokens):
            place = jnp.take_along_axis(state.draft.place, tokens[-1][:, None], axis=1)
            tokens.append(jnp.take_along_axis(state.tokens, place, axis=1)[:, 0])
            known.append(place[:, 0] > 0)
        is_candidate = jnp.stack([jnp.zeros(len(state.tokens), bool), *known], axis=1)
        return fixed_proposal(Tree.chain(self.num_nodes), jnp.stack(tokens, axis=1), is_candidate), state.draft

    def update(self, params, draft_params, state, outcome):
        return self._note(state.draft.place, state, state.length - outcome.num_emitted, self.num_nodes)

    def _note(self, places, state, first, count):
        """Records the successors at places first .. first + count - 1 that are within the row."""
        place = jnp.broadcast_to(first, state.length.shape)[:, None] + jnp.arange(count)[None, :]
        before = jnp.take_along_axis(state.tokens, jnp.minimum(place, state.tokens.shape[1]) - 1, axis=1)
        row = jnp.arange(len(places))[:, None]
        return Successors(
            places.at[row, before].max(jnp.where(place < state.length[:, None], place, 0).astype(jnp.int32))
        )
