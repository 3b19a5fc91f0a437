"""Drafts a chain or a tree with a smaller language model, whose own KV cache holds what the target accepts.

Papers: Fast Inference from Transformers via Speculative Decoding (chains), arXiv 2211.17192; SpecInfer (trees of
independent children), arXiv 2305.09781; Sequoia (children without replacement), arXiv 2402.12374.

The tree is drafted level by level, in one compiled loop. Cache updates of draft tokens are staged beside the draft's
cache and committed when the target has accepted the tokens, so nothing rejected enters it. Leaves are drafted but not
run; when one is accepted, the next round begins by running it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from decodax.decoding.chunked_prefill import all_layers, prefill_caches
from decodax.decoding.draft_vocabulary import check_vocabulary
from decodax.decoding.drafters._expand import empty_logprobs, with_drawn_children
from decodax.decoding.drafters._size import check_chain, set_tree
from decodax.decoding.drafters._staged_draft import Level, StagedDraft, draft_levels
from decodax.decoding.drafters._tree_levels import children_table, tree_layout
from decodax.decoding.drafters.contract import Children, Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.decoding.tree_logits import node_history, node_logits
from decodax.models.model import Model, commit


@dataclass(frozen=True)
class DraftModel(Drafter):
    """A draft model; make it with `chain`, `top_k` or `sampled`.

    Its state is its caches, which hold all tokens of a row but the last one, or but the last two.

    model: the draft model.
    parents: the tree, as in `Tree.fixed`.
    children: how they are found.
    """

    model: Model
    parents: tuple[int, ...]
    children: Children = Children.INDEPENDENT
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    auxiliary_weights = "a small language model with the target's tokenizer: `decodax train draft`"

    def __post_init__(self) -> None:
        set_tree(self, self.parents)

    @classmethod
    def chain(cls, model: Model, num_tokens: int) -> "DraftModel":
        """A chain of `num_tokens` tokens drawn from the draft's distribution (in greedy rows the most probable)."""
        check_chain(num_tokens)
        return cls(model, tuple(range(-1, num_tokens)))

    @classmethod
    def top_k(cls, model: Model, parents: Sequence[int]) -> "DraftModel":
        """A fixed tree (`parents` as in `Tree.fixed`) whose children are the most probable tokens, in order."""
        return cls(model, tuple(parents), Children.CHOSEN)

    @classmethod
    def sampled(cls, model: Model, parents: Sequence[int], *, replacement: bool = False) -> "DraftModel":
        """A fixed tree whose children are drawn from the draft's distribution (in greedy rows the most probable).

        With `replacement` they are independent, so that several may be the same token.
        """
        children = Children.INDEPENDENT if replacement else Children.WITHOUT_REPLACEMENT
        return cls(model, tuple(parents), children)

    def constrained(self, draft: Any, model: Model) -> Any:
        return self.model.execution.constrained(draft)

    def check(self, model: Model, draft_params: Any) -> None:
        check_vocabulary(self.model, model)

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Any, ...]:
        batch, capacity = state.tokens.shape
        caches = self.model.empty_cache(batch, capacity, self.model.dtype(draft_params))
        run = all_layers(self.model, draft_params)
        return prefill_caches(run, caches, state.tokens, state.length, skip=state.failed)

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, tuple[Any, ...]]:
        tree, caches = Tree.fixed(self.parents), state.draft
        nodes, vocab_size = tree.num_nodes, self.model.vocab_size
        lacks_two = state.length - caches[0].length > 1
        # One node more than the tree has: the token before the last one.
        updates = self.model.empty_update(state.tokens.shape[0], nodes + 1, self.model.dtype(draft_params))
        logprobs = empty_logprobs(state, self.children, nodes, vocab_size)
        draft = StagedDraft.begin(state, nodes + 1, updates, logprobs=logprobs)
        before = jnp.take_along_axis(state.tokens, jnp.maximum(state.length[:, None] - 2, 0), axis=1)[:, 0]
        draft = draft.with_children(jnp.int32(nodes), before, jnp.zeros_like(state.done))
        # The first level is that token; it runs when some row's cache lacks it.
        first = 1 - jnp.any(lacks_two & ~state.done).astype(jnp.int32)
        draft = dataclasses.replace(draft, level=first)
        layout = tree_layout(tree, state.length, lacks_two)

        def run(draft: StagedDraft, level: Level) -> tuple[Float32[Array, "B W V"], tuple[Any, ...]]:
            staged = level.stage(caches, draft.updates)
            out = self.model.apply(draft_params, level.token, level.position, staged, mask=level.mask)
            return self.model.logits(draft_params, out.hidden), out.cache_updates

        def expand(draft: StagedDraft, level: Level, logits: Float32[Array, "B W V"]) -> StagedDraft:
            return self._expand(draft, state, tree, level.node, logits)

        draft = draft_levels(draft, layout, run, expand, len(layout.levels))
        token, is_candidate, forwards = draft.token[:, :nodes], draft.is_candidate[:, :nodes], draft.level - first
        proposal = fixed_proposal(tree, token, is_candidate, logprobs=draft.logprobs, forwards=forwards)
        return proposal, (caches, draft.updates)

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> tuple[Any, ...]:
        caches, updates = state.draft
        has_children = np.isin(np.arange(self.num_nodes), self.parents)  # the others were not run
        num_lacking = state.length - outcome.num_emitted - caches[0].length
        is_accepted = jnp.arange(self.max_depth)[None, :] < outcome.num_emitted[:, None] - 1
        was_run = is_accepted & jnp.asarray(has_children)[outcome.path[:, 1:]]
        count = jnp.where(outcome.num_emitted > 0, num_lacking + jnp.sum(was_run, axis=1, dtype=jnp.int32), 0)
        # The token before the last one, where the cache lacks it; then the last one and those accepted after it.
        path = jnp.pad(outcome.path, ((0, 0), (1, 0)), constant_values=self.num_nodes)
        place_of = jnp.arange(path.shape[1], dtype=jnp.int32)[None, :] + (2 - num_lacking)[:, None]
        return commit(
            caches, updates, count, jnp.take_along_axis(path, jnp.minimum(place_of, path.shape[1] - 1), axis=1)
        )

    def _expand(
        self, draft: StagedDraft, state: DecodeState, tree: Tree, level: Int[Array, " W"], logits: Array
    ) -> StagedDraft:
        """Adds the children of a level's nodes.

        The most probable ones do not depend on what shapes a draw. Without that, a greedy row beside sampled ones gets
        the same children as alone.
        """
        kind = self.children if state.sampling.do_sample else Children.CHOSEN
        sampling = state.sampling.greedy if kind is Children.CHOSEN else state.sampling
        history = node_history(state.history, tree, draft.token[:, : tree.num_nodes])
        node = jnp.minimum(level, tree.num_nodes - 1)
        logits = node_logits(sampling, logits, jax.tree.map(lambda counts: counts[:, node], history))
        position = state.length[:, None] + jnp.asarray(tree.depth)[:, node]
        return with_drawn_children(
            draft, state, kind, logits, level, jnp.asarray(children_table(tree))[level], position
        )
