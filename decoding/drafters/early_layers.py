"""The target's own first layers draft: after a few of them its head already guesses, and the rest verify the guesses.

LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, arXiv 2404.16710. Works with models that were
taught to exit early (`decodax train layer_skip`, or published LayerSkip checkpoints).

Draft and verification share the cache, and nothing is run twice: the hidden states after the first layers, and the
rows of these, are handed over for every node, so that the verification begins at the layer where the draft ended. So
the last token of a draft has to run the first layers as well, though nothing is drafted from it. Departs from the paper
in that a draft always has its full length; the paper's code ends one early at the end of a text.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.decoding.drafters._contract import Drafter, Proposal, fixed_proposal
from decodax.decoding.drafters._exits import check_draft, check_exit, likeliest, staged_before
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.logits_processors import History
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.layers.kv_cache.staged import place, stage
from decodax.models.model import Model


class _Draft(NamedTuple):
    """A draft under way: tokens so far, what stands after the first layers at the nodes run, and these layers' rows.

    history: as if the tokens had been written.
    """

    token: Int[Array, "B C"]
    history: History
    vectors: Float[Array, "B C D"]
    rows: tuple[Any, ...]


@dataclass(frozen=True)
class EarlyLayers(Drafter):
    """A chain of `max_tokens` tokens, each the likeliest after the first `exit_layer` layers of `model`, the target."""

    model: Model
    exit_layer: int
    max_tokens: int
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    trained_part = "a model taught to exit early: `decodax train layer_skip`, or a LayerSkip checkpoint"

    def __post_init__(self) -> None:
        check_exit(self.model, self.exit_layer)
        set_chain(self, self.max_tokens)

    def check(self, model: Model, draft_params: Any) -> None:
        check_draft(self.model, model, draft_params)

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Any]:
        tree, pending, exit_layer = Tree.chain(self.num_nodes), state.pending(), self.exit_layer
        position = state.length[:, None] - 1 + jnp.asarray(tree.depth)
        dtype, batch = params["embedding"].dtype, pending.shape[0]
        draft = _Draft(
            jnp.zeros(position.shape, jnp.int32).at[:, 0].set(pending),
            state.history,
            jnp.zeros((*position.shape, self.model.config.hidden_size), dtype),
            self.model.empty_rows(batch, self.num_nodes, dtype)[:exit_layer],
        )

        def run(node: Int[Array, ""], draft: _Draft) -> _Draft:
            staged = (*stage(state.caches[:exit_layer], draft.rows, position), *state.caches[exit_layer:])
            out = self.model.apply(
                params,
                jax.lax.dynamic_slice_in_dim(draft.token, node, 1, axis=1),
                jax.lax.dynamic_slice_in_dim(position, node, 1, axis=1),
                staged,
                mask=staged_before(node, self.num_nodes),
                layers=(0, exit_layer),
            )
            vectors = jax.lax.dynamic_update_slice_in_dim(draft.vectors, out.hidden, node, axis=1)
            draft = draft._replace(vectors=vectors, rows=place(draft.rows, out.rows, node[None]))

            def guess() -> Int[Array, " B"]:
                logits = self.model.logits(params, out.hidden)[:, 0]
                return likeliest(state.sampling, logits, draft.history)[0]

            # Nothing is drafted from the last node, so the head need not read it.
            drafted = jax.lax.cond(node < self.max_tokens, guess, lambda: pending)
            token = draft.token.at[:, node + 1].set(drafted, mode="drop")
            history = draft.history.record(drafted[:, None], jnp.ones_like(pending))
            return draft._replace(token=token, history=history)

        draft = jax.lax.fori_loop(0, self.num_nodes, run, draft)
        proposal = fixed_proposal(tree, draft.token, jnp.ones(position.shape, bool), forwards=self.num_nodes)
        layers_run = self.num_nodes * exit_layer
        handed_over = {"vectors": draft.vectors, "rows": draft.rows, "layers_run": layers_run}
        return dataclasses.replace(proposal, **handed_over), state.draft
