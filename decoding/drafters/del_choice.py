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
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core import pytree
from decodax.decoding.drafters._exits import chain_proposal, check_draft, check_exit, draft_chain
from decodax.decoding.drafters._size import set_chain
from decodax.decoding.drafters._staged_draft import Level, StagedDraft
from decodax.decoding.drafters.contract import Drafter, Outcome, Proposal
from decodax.decoding.early_exit import run_layer
from decodax.decoding.exit_choice import best_exit
from decodax.decoding.exit_counts import ExitCounts, evaluate_exits
from decodax.decoding.logits_processors import History
from decodax.decoding.sampling import Sampling
from decodax.decoding.state import DecodeState
from decodax.layers.kv_cache.contract import Rewindable
from decodax.models.model import Model

DECAY = 0.95  # of the counts, per round
PROMPT_TOKENS = 32  # at each prompt's end, from which the first counts come


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
        counts = evaluate_exits(self.model, params, Sampling((), False), states, target_token, count, state.history)
        return DelState(counts, jnp.int32(0))

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, DelState]:
        counts: ExitCounts = state.draft.counts
        exit_layer, length = best_exit(counts.agreement(), self.num_exits + 1, self.max_tokens)
        threshold, model = counts.threshold()[exit_layer - 1], self.model
        shape, dtype = (state.tokens.shape[0], self.num_nodes), model.dtype(params)

        def run(draft: StagedDraft, level: Level):
            """Runs the node through the layers before the exit; the others are not computed."""
            hidden, states, updates = model.embed(params, level.token, level.position), draft.own.own, []
            caches = (*level.stage(state.caches[:-1], draft.updates), state.caches[-1])
            for index in range(self.num_exits):
                runs = jnp.asarray(index) < exit_layer
                hidden, new, _ = run_layer(model, params, index, hidden, level.position, caches, level.mask, runs)
                updates.append(new)
                states = jax.lax.dynamic_update_slice(states, hidden[None], (index, 0, draft.level, 0))
            return hidden, hidden, states, tuple(updates)

        def ends_together(confidence: Float32[Array, " B"]) -> tuple[Bool[Array, " B"], Bool[Array, " B"]]:
            ends = jnp.broadcast_to(jnp.all((confidence < threshold) | state.done), confidence.shape)
            return ~ends, ~ends

        *updates, last_update = model.empty_update(*shape, dtype)
        draft = draft_chain(
            model,
            params,
            state,
            tuple(updates),
            run,
            head=lambda hidden: model.logits(params, hidden),
            rule=ends_together,
            num_nodes=self.num_nodes,
            limit=length + 1,
            own=jnp.zeros((self.num_exits, *shape, model.config.hidden_size), dtype),
        )
        drafted = Drafted(exit_layer, draft.own.own, state.history)
        proposal = chain_proposal(draft, exit_layer, (*draft.updates, last_update))
        return proposal, dataclasses.replace(state.draft, drafted=drafted)

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> DelState:
        before, drafted, emitted = state.draft, state.draft.drafted, outcome.num_emitted
        captured = jnp.stack([outcome.forward.captured[layer] for layer in self.capture])
        was_drafted = jnp.asarray(self.capture) <= drafted.exit_layer
        states = jnp.where(was_drafted[:, None, None, None], drafted.states, captured)
        position = (state.length - emitted)[:, None] + jnp.arange(self.num_nodes, dtype=jnp.int32)[None, :]
        token = jnp.take_along_axis(state.tokens, jnp.minimum(position, state.tokens.shape[1] - 1), axis=1)
        evaluates = before.round % self.every == 0
        count = jnp.where(evaluates, emitted, 0)
        new = evaluate_exits(self.model, params, state.sampling, states, token, count, drafted.history)
        old = before.counts.decayed(jnp.where(evaluates, DECAY, 1.0))
        return DelState(jax.tree.map(jnp.add, old, new), before.round + 1)
