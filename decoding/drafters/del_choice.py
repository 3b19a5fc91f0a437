"""Drafts with the target's first layers; every round chooses the exit layer and the draft length (DEL).

DEL: Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding, arXiv 2504.05598. After verification the
hidden states after every layer are known, and the head gives the token that each layer would have drafted (shadow
tokens). How often these match the emitted tokens, decayed from round to round, gives the exit layer and the length with
the most expected tokens per layer (`decoding/exit_choice.py`), and the confidence below which a draft ends.

Details that are decided here, and departures from the paper:
- The rows of a batch share every forward, so exit and length are those of the batch, and the counts are pooled over it.
- A draft may have no token: where no exit pays, a round is a step of plain decoding.
- The counted positions of a round are the verified ones: the last token and the draft tokens accepted after it. A
  layer's token there is right when it is the one that the target emitted.
- A draft ends for the batch when every row that is not done has a confidence below the threshold; that token is not
  proposed. Until an exit has been right and wrong at least once, it has no threshold.
- The first counts come from the last PROMPT_TOKENS tokens of the prompts, against the target's most probable tokens.
  Where some cache cannot be rewound to before them (a recurrent state), the counts start at zero.
- Evaluating the exits costs a pass through the head for every layer but the last, at every counted position; no layer
  runs again. With `every` = n it happens in each n-th round only.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from decodax.core import pytree
from decodax.decoding.drafters._exits import argmax_and_confidence, check_draft, check_exit, staged_before
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.drafters.contract import Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.early_exit import run_layer
from decodax.decoding.exit_choice import best_exit
from decodax.decoding.logits_processors import History
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.layers.kv_cache.contract import Rewindable
from decodax.layers.kv_cache.staged import stage
from decodax.models.model import Model

DECAY = 0.95  # of the counts, per round
PROMPT_TOKENS = 32  # at each prompt's end, from which the first counts come
UNSEEN = 0.5  # the agreement of an exit without counts


@pytree.dataclass
class ExitCounts:
    """Decayed counts for the exit after each layer but the last.

    right, wrong: tokens.
    right_confidence, wrong_confidence: summed confidences of those tokens.
    """

    right: Float32[Array, " exits"]
    wrong: Float32[Array, " exits"]
    right_confidence: Float32[Array, " exits"]
    wrong_confidence: Float32[Array, " exits"]

    @classmethod
    def zero(cls, num_exits: int) -> "ExitCounts":
        return cls(*jnp.zeros((4, num_exits), jnp.float32))

    def decayed(self, by: Float32[Array, ""]) -> "ExitCounts":
        return jax.tree.map(lambda count: by * count, self)

    def agreement(self) -> Float32[Array, " exits"]:
        """The share of right tokens."""
        total = self.right + self.wrong
        return jnp.where(total > 0, self.right / jnp.maximum(total, 1e-9), UNSEEN)

    def threshold(self) -> Float32[Array, " exits"]:
        """The midpoint of the mean confidences in right and in wrong tokens; 0 where there were none of a kind."""
        right = self.right_confidence / jnp.maximum(self.right, 1e-9)
        wrong = self.wrong_confidence / jnp.maximum(self.wrong, 1e-9)
        return jnp.where((self.right > 0) & (self.wrong > 0), (right + wrong) / 2, 0.0)


class Drafted(NamedTuple):
    """What a draft keeps until it is verified.

    exit_layer: the layer after which it left the target.
    states[l - 1]: hidden states after l layers, at every node that was run; valid up to the exit.
    history: before the round.
    """

    exit_layer: Int[Array, ""]
    states: Float[Array, "exits B C D"]
    history: History


@pytree.dataclass
class DelState:
    """The drafter's state.

    counts: of every exit so far.
    round: rounds done.
    drafted: between a proposal and its outcome.
    """

    counts: ExitCounts
    round: Int[Array, ""]
    drafted: Drafted | None = None


class _Draft(NamedTuple):
    """A draft in progress.

    node: the next to run.
    end: the number of nodes that the draft will have.
    token: the draft tokens so far.
    history: as if the tokens had been emitted.
    states: as in `Drafted`.
    vectors: hidden states after the exit layer.
    cache_updates: of every layer.
    """

    node: Int[Array, ""]
    end: Int[Array, ""]
    token: Int[Array, "B C"]
    history: History
    states: Float[Array, "exits B C D"]
    vectors: Float[Array, "B C D"]
    cache_updates: tuple[Any, ...]


@dataclass(frozen=True)
class DynamicExit(Drafter):
    """A chain of draft tokens from the exit layer with the most expected tokens per layer.

    model: the target.
    max_tokens: of a draft.
    every: rounds between evaluations of the exits.
    """

    model: Model
    max_tokens: int = 12
    every: int = 1
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)
    capture: tuple[int, ...] = field(init=False)

    auxiliary_weights = "a model taught to exit early: `decodax train layer_skip`, or a LayerSkip checkpoint"

    def __post_init__(self) -> None:
        check_exit(self.model, 1)
        if self.every < 1:
            raise ValueError(f"every must be at least 1 (rounds between evaluations of the exits), got {self.every}")
        set_chain(self, self.max_tokens)
        object.__setattr__(self, "capture", tuple(range(1, self.num_exits + 1)))

    @property
    def num_exits(self) -> int:
        return self.model.config.num_layers - 1

    def check(self, model: Model, draft_params: Any) -> None:
        check_draft(self.model, model, draft_params)

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> DelState:
        """Runs the prompts' last tokens before the last one once more, through all layers, to evaluate every exit.

        Nothing runs where a cache is not `Rewindable`: the counts then come from the rounds alone.
        """
        if not all(isinstance(cache, Rewindable) for cache in state.caches):
            return DelState(ExitCounts.zero(self.num_exits), jnp.int32(0))
        num_tokens = min(PROMPT_TOKENS, state.tokens.shape[1])
        first = jnp.maximum(state.length - 1 - num_tokens, 0)
        position = first[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
        before = tuple(cache.rewound(first) for cache in state.caches)
        token = jnp.take_along_axis(state.tokens, jnp.minimum(position, state.tokens.shape[1] - 1), axis=1)
        out = self.model.apply(params, token, position, before, capture=self.capture)
        states = jnp.stack([out.captured[layer] for layer in self.capture])
        target_token = jnp.argmax(self.model.logits(params, out.hidden), axis=2).astype(jnp.int32)
        count = jnp.where(state.done, 0, jnp.minimum(num_tokens, state.length - 1))
        counts = self._evaluate(params, Sampling((), False), states, target_token, count, state.history)
        return DelState(counts, jnp.int32(0))

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, DelState]:
        counts: ExitCounts = state.draft.counts
        tree, last_token = Tree.chain(self.num_nodes), state.last_token()
        exit_layer, length = best_exit(counts.agreement(), self.num_exits + 1, self.max_tokens)
        threshold = counts.threshold()[exit_layer - 1]
        dtype, shape = self.model.dtype(params), (*last_token.shape, self.num_nodes)
        draft = _Draft(
            jnp.int32(0),
            length + 1,
            jnp.zeros(shape, jnp.int32).at[:, 0].set(last_token),
            state.history,
            jnp.zeros((self.num_exits, *shape, self.model.config.hidden_size), dtype),
            jnp.zeros((*shape, self.model.config.hidden_size), dtype),
            self.model.empty_update(shape[0], shape[1], dtype),
        )

        def run(draft: _Draft) -> _Draft:
            draft, hidden = self._run_node(params, state, draft, exit_layer)

            def draft_token() -> tuple[Int[Array, " B"], Float32[Array, " B"]]:
                logits = self.model.logits(params, hidden)[:, 0]
                return argmax_and_confidence(state.sampling, logits, draft.history)

            # Nothing is drafted from the last node, so the head does not run there.
            is_last = draft.node + 1 >= draft.end
            token, confidence = jax.lax.cond(is_last, lambda: (last_token, jnp.zeros(last_token.shape)), draft_token)
            ends = jnp.all((confidence < threshold) | state.done)
            return draft._replace(
                node=draft.node + 1,
                end=jnp.where(ends, draft.node + 1, draft.end),
                token=draft.token.at[:, draft.node + 1].set(token, mode="drop"),
                history=draft.history.record(token[:, None], jnp.ones_like(token)),
            )

        draft = jax.lax.while_loop(lambda draft: draft.node < draft.end, run, draft)
        is_drafted = jnp.broadcast_to((jnp.arange(self.num_nodes) < draft.end)[None, :], shape)
        proposal = dataclasses.replace(
            fixed_proposal(tree, draft.token, is_drafted, forwards=draft.end),
            vectors=draft.vectors,
            cache_updates=draft.cache_updates,
            first_layer=exit_layer,
            layers_run=draft.end * exit_layer,
        )
        drafted = Drafted(exit_layer, draft.states, state.history)
        return proposal, dataclasses.replace(state.draft, drafted=drafted)

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> DelState:
        before, drafted, emitted = state.draft, state.draft.drafted, outcome.num_emitted
        captured = jnp.stack([outcome.forward.captured[layer] for layer in self.capture])
        was_drafted = jnp.asarray(self.capture) <= drafted.exit_layer
        states = jnp.where(was_drafted[:, None, None, None], drafted.states, captured)
        position = (state.length - emitted)[:, None] + jnp.arange(self.num_nodes, dtype=jnp.int32)[None, :]
        token = jnp.take_along_axis(state.tokens, jnp.minimum(position, state.tokens.shape[1] - 1), axis=1)
        evaluates = before.round % self.every == 0
        new = self._evaluate(params, state.sampling, states, token, jnp.where(evaluates, emitted, 0), drafted.history)
        old = before.counts.decayed(jnp.where(evaluates, DECAY, 1.0))
        return DelState(jax.tree.map(jnp.add, old, new), before.round + 1)

    def _run_node(
        self, params: Any, state: DecodeState, draft: _Draft, exit_layer: Int[Array, ""]
    ) -> tuple[_Draft, Float[Array, "B 1 D"]]:
        """Runs the draft's next node through the layers before the exit; the others are not computed."""
        tree, node = Tree.chain(self.num_nodes), draft.node
        position = state.length[:, None] - 1 + jnp.asarray(tree.depth)
        own = jax.lax.dynamic_slice_in_dim(position, node, 1, axis=1)
        hidden = self.model.embed(params, jax.lax.dynamic_slice_in_dim(draft.token, node, 1, axis=1))
        mask, staged = staged_before(node, self.num_nodes), stage(state.caches, draft.cache_updates, position)
        updates, states = list(draft.cache_updates), draft.states
        for index in range(self.num_exits):
            hidden, new, _ = run_layer(
                self.model, params, index, hidden, own, staged, mask, jnp.asarray(index) < exit_layer
            )
            updates[index] = updates[index].place(new, node[None])
            states = jax.lax.dynamic_update_slice(states, hidden[None], (index, 0, node, 0))
        vectors = jax.lax.dynamic_update_slice_in_dim(draft.vectors, hidden, node, axis=1)
        return draft._replace(states=states, vectors=vectors, cache_updates=tuple(updates)), hidden

    def _evaluate(
        self,
        params: Any,
        sampling: Sampling,
        states: Float[Array, "exits B C D"],
        target_token: Int[Array, "B C"],
        count: Int[Array, " B"],
        history: History,
    ) -> ExitCounts:
        """Counts of every exit's tokens against the target's, at the first `count[b]` positions of row b.

        One position after the other, as the logits of all of them at once would be large.

        sampling: the options under which an exit's token is the most probable.
        states: hidden states after each layer.
        target_token: the right tokens.
        history: at the first position.
        """

        def add(node: Int[Array, ""], carry: tuple[ExitCounts, History]) -> tuple[ExitCounts, History]:
            counts, history = carry
            hidden = jax.lax.dynamic_slice_in_dim(states, node, 1, axis=2)
            exits, batch = hidden.shape[:2]
            logits = self.model.logits(params, hidden.reshape(exits * batch, 1, -1)).reshape(exits, batch, -1)
            token, confidence = jax.vmap(lambda logits: argmax_and_confidence(sampling, logits, history))(logits)
            target = jax.lax.dynamic_slice_in_dim(target_token, node, 1, axis=1)
            is_right = token == target.T
            counts_here = (node < count)[None, :]
            right, wrong = is_right & counts_here, ~is_right & counts_here
            new = [jnp.sum(kind, axis=1, dtype=jnp.float32) for kind in (right, wrong)]
            new += [jnp.sum(jnp.where(kind, confidence, 0.0), axis=1) for kind in (right, wrong)]
            after = history.record(target, jnp.ones(batch, jnp.int32))
            return jax.tree.map(jnp.add, counts, ExitCounts(*new)), after

        return jax.lax.fori_loop(0, jnp.max(count), add, (ExitCounts.zero(self.num_exits), history))[0]
