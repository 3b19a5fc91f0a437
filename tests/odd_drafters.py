"""Defines drafters for tests: trees of any shape, and drafts from the target's own first layer."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decodax.core import pytree
from decodax.decoding.drafters import Drafter, fixed_proposal
from decodax.decoding.drafters.wider_proposals import LayerProposal
from decodax.decoding.tree import Tree
from decodax.layers.attention.mask import Ancestors
from decodax.layers.kv_cache.staged import place, stage
from decodax.models.model import Model
from tests.speculation import MODEL


@pytree.dataclass
class Seen:
    """The outcome of the last round, as `RandomTrees` records it."""

    token: Int[Array, "B C"]
    parent: Int[Array, "B C"]
    is_candidate: Bool[Array, "B C"]
    logits: Float[Array, "B C V"]
    captured: dict[int, Float[Array, "B C D"]]
    path: Int[Array, "B A"]
    num_emitted: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class RandomTrees(Drafter):
    """Every row draws its own tree in every round; a node is the recorded token of its place or any other.

    Some nodes are no candidates. The state is the last round's outcome.
    """

    num_nodes: int = 7
    max_depth: int = 6
    capture: tuple[int, ...] = (0, 1, 2)
    model: Model = MODEL

    def start(self, params, draft_params, state):
        batch, nodes = state.tokens.shape[0], self.num_nodes
        whole = jnp.zeros((batch, nodes), jnp.int32)
        config = self.model.config
        hidden = jnp.zeros((batch, nodes, config.hidden_size))
        return Seen(
            whole, whole, whole > 0, jnp.zeros((batch, nodes, config.vocab_size)), dict.fromkeys(self.capture, hidden),
            jnp.zeros((batch, self.max_depth + 1), jnp.int32), jnp.zeros(batch, jnp.int32),
        )  # fmt: skip

    def propose(self, params, recorded, state):
        def of_row(seed, length):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), length), 4)
            node = jnp.arange(self.num_nodes)
            # The latest node twice as often as any other, so that some paths are long.
            parent = jnp.minimum(jax.random.randint(keys[0], node.shape, 0, jnp.maximum(node * 2, 1)), node - 1)
            token = jax.random.randint(keys[1], node.shape, 0, self.model.config.vocab_size)
            return (
                parent,
                token,
                jax.random.bernoulli(keys[2], 0.7, node.shape),
                jax.random.bernoulli(keys[3], 0.9, node.shape),
            )

        parent, token, is_recorded, is_candidate = jax.vmap(of_row)(state.seed, state.length)
        tree = Tree.grown(parent)
        place = jnp.minimum(state.length[:, None] - 1 + tree.depth, recorded.shape[1] - 1)
        token = jnp.where(is_recorded, jnp.take_along_axis(recorded, place, axis=1), token)
        return fixed_proposal(tree, token.at[:, 0].set(state.last_token()), is_candidate), state.draft

    def update(self, params, draft_params, state, outcome):
        proposal = outcome.proposal
        return Seen(
            proposal.token, jnp.asarray(proposal.tree.parent), proposal.is_candidate, outcome.logits,
            outcome.forward.captured, outcome.path, outcome.num_emitted,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ShallowExit(Drafter):
    """The target's own first layer and head draft a chain; the target then starts from the second layer."""

    num_nodes: int = 4
    max_depth: int = 3

    def propose(self, params, draft_params, state):
        tree, base = Tree.chain(self.num_nodes), state.length[:, None] - 1
        batch = state.tokens.shape[0]
        token = jnp.zeros((batch, self.num_nodes), jnp.int32).at[:, 0].set(state.last_token())
        updates = MODEL.empty_update(batch, self.num_nodes, jnp.float32)[:1]
        vectors = []
        for node in range(self.num_nodes):
            staged = stage(state.caches[:1], updates, base + jnp.asarray(tree.depth))
            allowed = jnp.concatenate([jnp.arange(self.num_nodes) < node, jnp.ones(1, bool)])
            out = MODEL.apply(
                params, token[:, node : node + 1], base + node, (*staged, *state.caches[1:]),
                mask=Ancestors(allowed[None, None]), layers=(0, 1),
            )  # fmt: skip
            updates = place(updates, out.cache_updates, jnp.array([node]))
            vectors.append(out.hidden)
            if node + 1 < self.num_nodes:
                draft_token = jnp.argmax(MODEL.logits(params, out.hidden)[:, 0], axis=1)
                token = token.at[:, node + 1].set(draft_token.astype(jnp.int32))
        proposal = fixed_proposal(tree, token, jnp.ones(token.shape, bool))
        hidden = jnp.concatenate(vectors, axis=1)
        return LayerProposal.extend(proposal, hidden, cache_updates=updates), state.draft
