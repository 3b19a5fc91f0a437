"""Defines a drafter, a verifier and a cache policy outside decodax, importing only its public modules."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from decodax.core import pytree
from decodax.decoding import Tree
from decodax.decoding.drafters import Children, Drafter, fixed_proposal
from decodax.decoding.verifiers import Verdict, Verifier, at_node


@dataclass(frozen=True)
class LastSuccessor(Drafter):
    """A chain in which every token is followed by what followed it the last time.

    Its state says where, for each row and token: Int[B, V], the place after its last occurrence; 0: none.
    """

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
            place = jnp.take_along_axis(state.draft, tokens[-1][:, None], axis=1)
            tokens.append(jnp.take_along_axis(state.tokens, place, axis=1)[:, 0])
            known.append(place[:, 0] > 0)
        is_candidate = jnp.stack([jnp.zeros(len(state.tokens), bool), *known], axis=1)
        return fixed_proposal(Tree.chain(self.num_nodes), jnp.stack(tokens, axis=1), is_candidate), state.draft

    def update(self, params, draft_params, state, outcome):
        return self._note(state.draft, state, state.length - outcome.num_emitted, self.num_nodes)

    def _note(self, places, state, first, count):
        """Records the successors at places first .. first + count - 1 that are within the row."""
        place = jnp.broadcast_to(first, state.length.shape)[:, None] + jnp.arange(count)[None, :]
        before = jnp.take_along_axis(state.tokens, jnp.minimum(place, state.tokens.shape[1]) - 1, axis=1)
        row = jnp.arange(len(places))[:, None]
        return places.at[row, before].max(jnp.where(place < state.length[:, None], place, 0).astype(jnp.int32))


@dataclass(frozen=True)
class AmongTopTokens(Verifier):
    """Accepts any draft token that is among the target's `count` most probable; then the most probable. Lossy."""

    count: int
    lossless = False
    supported_children = frozenset(Children)

    def verify_greedy(self, proposal, logits):
        least = jax.lax.top_k(logits, self.count)[0][..., -1:]
        is_likely = jnp.take_along_axis(logits >= least, proposal.parent[..., None], axis=1)
        accepted = jnp.take_along_axis(is_likely, proposal.token[..., None], axis=2)[..., 0] & proposal.is_candidate
        node = proposal.tree.accepted_path(accepted)
        best = jnp.argmax(logits, axis=2).astype(jnp.int32)
        return Verdict(node, at_node(best, node))


@pytree.dataclass
class Int8Cache:
    """Keys and values in 8 bits, each token and head with a scale of its own: value = integer x scale."""

    key: jax.Array  # int8
    value: jax.Array
    key_scale: jax.Array  # float32
    value_scale: jax.Array
    length: jax.Array

    def axes(self):
        by_token = dict.fromkeys(("key_scale", "value_scale"), "B K S")
        return dataclasses.replace(self, key="B K S H", value="B K S H", **by_token, length="B")

    @classmethod
    def empty(cls, batch_size, num_kv_heads, capacity, head_size, dtype):
        shape = (batch_size, num_kv_heads, capacity)
        integers, scales = jnp.zeros((*shape, head_size), jnp.int8), jnp.zeros(shape)
        return cls(integers, integers, scales, scales, jnp.zeros(batch_size, jnp.int32))

    capacity = property(lambda self: self.key.shape[2])

    def read(self, start, num_tokens):
        arrays = (self.key, self.key_scale, self.value, self.value_scale)
        key, key_scale, value, value_scale = (
            jax.lax.dynamic_slice_in_dim(array, start, num_tokens, axis=2).astype(jnp.float32) for array in arrays
        )
        slot = start + jnp.arange(num_tokens)[None, :]
        filled = (slot < self.length[:, None])[:, None, :]
        return key * key_scale[..., None], value * value_scale[..., None], slot, filled

    def commit(self, rows, count, path=None):
        new = (*quantised(rows.key), *quantised(rows.value))
        if path is not None:
            new = tuple(
                jnp.take_along_axis(x, path.reshape(len(path), 1, -1, *[1] * (x.ndim - 3)), axis=2) for x in new
            )
        offset = jnp.arange(new[0].shape[2])[None, :]
        slot = jnp.where(offset < count[:, None], self.length[:, None] + offset, self.capacity)
        row = jnp.arange(len(count))[:, None]
        old = (self.key, self.key_scale, self.value, self.value_scale)
        key, key_scale, value, value_scale = (
            mine.at[row, :, slot].set(jnp.moveaxis(x, 2, 1), mode="drop") for mine, x in zip(old, new, strict=True)
        )
        return dataclasses.replace(
            self, key=key, value=value, key_scale=key_scale, value_scale=value_scale, length=self.length + count
        )


def quantised(rows):
    """The values in 8 bits, and the scales."""
    scale = jnp.max(jnp.abs(rows), axis=-1) / 127
    return jnp.round(rows / jnp.maximum(scale, 1e-30)[..., None]).astype(jnp.int8), scale
