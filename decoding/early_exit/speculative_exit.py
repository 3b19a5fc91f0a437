"""Exits the target's layers once a predictor finds the next token settled among a draft's likely tokens (SpecEE).

SpecEE: Accelerating Large Language Model Inference with Speculative Early Exiting, arXiv 2504.08850. Finding the most
probable token after every layer would cost a product with the whole head each time. A draft names I = 4 likely tokens,
so that I columns of the head are enough for a small network (the predictor) to predict whether the token is final. Only
then is the head run, and the token exits only if the most probable token is one of the I. So there is no loss where
predictors are never wrong, and a threshold of 1 is decoding with all layers.

The tokens are a proposal's `likely` (`drafters/hints.py`), or, where it has none, the candidate children of each node.
Layers that a token skipped keep nothing of it (no keys and values, no change of a state): later tokens do not attend to
it there.

Departs from the paper: in a tree the nodes that decide are those on the path of the layer's own most probable tokens,
instead of all paths one by one; the feature "change" is 0 at the first predictor of a token; a token that ran all
layers counts as an exit after the last one in the schedule's memory.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.decoding.drafters.contract import Proposal
from decodax.decoding.drafters.wider_proposals import HintedProposal, LayerProposal
from decodax.decoding.early_exit.conditional_layer import run_layer
from decodax.decoding.early_exit.contract import LayerPolicy, TargetForward
from decodax.decoding.top_tokens import argmax_token
from decodax.layers.kv_cache.contract import MarksTokens
from decodax.layers.kv_cache.full import MarkedCache
from decodax.models.model import Model, Params
from decodax.models.transformer import Forward

WEIGHTS = "exit_predictors"  # their key in the target's parameters
SCHEDULES = ("all", "two_level")


def token_logits(
    model: Model, params: Params, normed: Float[Array, "*N D"], tokens: Int[Array, "*N I"]
) -> Float32[Array, "*N I"]:
    """The head's logits of I tokens each; -1 repeats the first of them."""
    known = jnp.maximum(jnp.where(tokens < 0, tokens[..., :1], tokens), 0)
    return model.token_logits(params, normed, known)


def exit_features(
    logits: Float32[Array, "*N I"], previous: Float32[Array, "*N I"]
) -> tuple[Float32[Array, "*N F"], Float32[Array, "*N I"]]:
    """A predictor's input: the logits, their softmax p, and p - `previous`, the p of the last predictor that ran.

    `previous` is -1 where there was none; the change is then 0. Also gives p, the next one's `previous`.
    """
    probs = jax.nn.softmax(logits, axis=-1)
    change = jnp.where(previous < 0, 0.0, probs - previous)
    return jnp.concatenate([logits, probs, change], axis=-1), probs


def exit_score(weights: Params, features: Float32[Array, "*N F"]) -> Float32[Array, "*N"]:
    """One predictor: a network of one hidden layer with ReLU. Its sigmoid: the probability that the token is final."""
    weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    bias = weights["hidden_bias"].reshape((1,) * (features.ndim - 1) + (-1,))
    hidden = jax.nn.relu(jnp.einsum("...f,fw->...w", features, weights["hidden"]) + bias)
    return jnp.einsum("...w,w->...", hidden, weights["out"]) + weights["out_bias"]


@dataclass(frozen=True)
class SpeculativeExit(LayerPolicy):
    """Row b exits after layer l if sigmoid(predictor_l(features)) > `threshold` and argmax(logits_l) is likely.

    In a tree that must hold for each node with likely tokens on the path of the layer's own most probable tokens from
    the root; nodes without likely tokens, such as the leaves of a tree without `likely`, do not vote, and exit after
    the same layer. The rule uses the model's own logits, before sampling options.

    The predictors are in the target's parameters as "exit_predictors", stacked over layers (entry l - 1 runs after l
    layers): {"hidden": [L-1, 3I, W], "hidden_bias": [L-1, W], "out": [L-1, W], "out_bias": [L-1]}. No count includes
    the cost of the predictors and the extra runs of the head: `layers_run` and `row_layers` are layers alone.
    `captured` of a row that has exited is the hidden state with which it exited. The policy's state is the row's last
    exits, newest first; 0 for none.

    threshold: in 0..1; 1 for no exits.
    schedule: "all" runs the predictors after every layer but the last; "two_level" runs, per row, those of `hot_layers`
        and those at most `reach` layers from one of the row's last `memory` exits.
    hot_layers: numbers of layers run where most exits were on held-out text.
    memory: exits remembered per row.
    reach: in layers.
    """

    threshold: float = 0.5
    schedule: str = "all"
    hot_layers: tuple[int, ...] = ()
    memory: int = 5
    reach: int = 2

    auxiliary_weights = "exit predictors: `decodax train specee`"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in 0..1 (1: no exits), got {self.threshold}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if bool(self.hot_layers) != (self.schedule == "two_level"):
            raise ValueError(
                f"hot_layers go with schedule 'two_level', which needs at least one; got {self.hot_layers} with "
                f"{self.schedule!r}"
            )
        if self.memory < 1 or self.reach < 0:
            raise ValueError(f"memory must be at least 1 and reach at least 0, got {self.memory} and {self.reach}")

    @property
    def cache_policy(self):
        return MarkedCache

    def check(self, model: Model, params: Params) -> None:
        num_layers = model.config.num_layers
        if model.invariant:
            raise ValueError("speculative exits need caches that mark tokens, which a model with invariant=True lacks")
        caches = jax.eval_shape(lambda: model.empty_cache(1, 1, jnp.float32, self.cache_policy))
        if not all(isinstance(cache, MarksTokens) and cache.marks_tokens for cache in caches):
            raise ValueError(
                "speculative exits need caches that mark tokens for which their layer did not run (`MarksTokens`), "
                f"got {', '.join(sorted({type(cache).__name__ for cache in caches}))}"
            )
        if any(not 1 <= layer < num_layers for layer in self.hot_layers):
            raise ValueError(f"hot_layers must be in 1..{num_layers - 1} (layers run), got {self.hot_layers}")
        if WEIGHTS not in params:
            raise ValueError(f"the parameters hold no {WEIGHTS!r}: add those that `decodax train specee` made")
        shape = params[WEIGHTS]["hidden"].shape
        if len(shape) != 3 or shape[0] != num_layers - 1 or shape[1] % 3:
            raise ValueError(f"exit predictors must be [L-1 = {num_layers - 1}, 3 x tokens, width], got {shape}")

    def start(self, model: Model, params: Params, batch_size: int) -> Int[Array, "B I"]:
        return jnp.zeros((batch_size, self.memory), jnp.int32)

    def forward(self, model, params, state, proposal, position, capture):
        if isinstance(proposal, LayerProposal):
            raise ValueError(
                "speculative exits need a drafter with a network of its own, not one of the target's layers"
            )
        likely = _likely(proposal, params[WEIGHTS]["hidden"].shape[1] // 3)
        num_layers, mask = model.config.num_layers, proposal.tree.mask()
        hidden, updates, captured = model.embed(params, proposal.token, position), [], {}
        if 0 in capture:
            captured[0] = hidden
        active, previous = ~state.done, jnp.full(likely.shape, -1.0, jnp.float32)
        scheduled = self._scheduled(state.layer_policy, num_layers)
        layers_run, row_layers = jnp.int32(0), jnp.zeros(active.shape, jnp.int32)
        for index in range(num_layers):
            hidden, new, ran = run_layer(model, params, index, hidden, position, state.caches, mask, active[:, None])
            updates.append(dataclasses.replace(new, kept=jnp.broadcast_to(active[:, None], position.shape)))
            layers_run, row_layers = layers_run + ran.astype(jnp.int32), row_layers + active.astype(jnp.int32)
            if index + 1 in capture:
                captured[index + 1] = hidden
            if index + 1 < num_layers:
                runs = active & scheduled[:, index]
                exits, previous = self._judge(model, params, index, hidden, proposal, likely, runs, previous)
                active = active & ~exits
        recent = jnp.concatenate([row_layers[:, None], state.layer_policy[:, :-1]], axis=1)
        return TargetForward(Forward(hidden, tuple(updates), captured), layers_run, row_layers, recent)

    def _scheduled(self, recent: Int[Array, "B I"], num_layers: int) -> Bool[Array, "B L_minus_1"]:
        """After which layers each row runs the predictors."""
        layer = np.arange(1, num_layers)
        if self.schedule == "all":
            return jnp.ones((recent.shape[0], len(layer)), bool)
        distance = jnp.abs(recent[:, :, None] - jnp.asarray(layer, jnp.int32)[None, None, :])
        is_near = jnp.any((distance <= self.reach) & (recent > 0)[:, :, None], axis=1)
        return is_near | jnp.asarray(np.isin(layer, self.hot_layers))[None, :]

    def _judge(
        self,
        model: Model,
        params: Params,
        index: int,
        hidden: Float[Array, "B C D"],
        proposal: Proposal,
        likely: Int[Array, "B C I"],
        runs: Bool[Array, " B"],
        previous: Float32[Array, "B C I"],
    ) -> tuple[Bool[Array, " B"], Float32[Array, "B C I"]]:
        """Which rows exit after layer `index`, and `previous` for their next predictor.

        hidden: after the layer.
        likely: the tokens of each node.
        runs: rows that run this predictor.
        previous: p of each row's last predictor.
        """
        votes = likely[:, :, 0] >= 0

        def judge(previous: Array) -> tuple[Array, Array]:
            normed = model.normed(params, hidden)
            features, probs = exit_features(token_logits(model, params, normed, likely), previous)
            weights = jax.tree.map(lambda leaf: leaf[index], params[WEIGHTS])
            fires = votes & (jax.nn.sigmoid(exit_score(weights, features)) > self.threshold)
            hopeful = runs & _may_agree(proposal, fires, votes)
            exits = jax.lax.cond(
                jnp.any(hopeful),
                lambda: hopeful & _agrees(proposal, fires, votes, likely, _top_tokens(model, params, normed)),
                lambda: jnp.zeros_like(hopeful),
            )
            return exits, jnp.where(runs[:, None, None], probs, previous)

        def skip(previous: Array) -> tuple[Array, Array]:
            return jnp.zeros_like(runs), previous

        with jax.named_scope("exit_predictor"):
            return jax.lax.cond(jnp.any(runs), judge, skip, previous)


def _likely(proposal: Proposal, count: int) -> Int[Array, "B C I"]:
    """A proposal's likely tokens, or the first `count` candidate children of each node; -1 where there is none.

    Raises ValueError when the proposal has another number of them than the predictors read.
    """
    if isinstance(proposal, HintedProposal):
        if proposal.likely.shape[2] != count:
            raise ValueError(
                f"the exit predictors read {count} likely tokens, the drafter gives {proposal.likely.shape[2]}"
            )
        return proposal.likely
    node = jnp.arange(proposal.token.shape[1])
    is_child = (jnp.asarray(proposal.tree.parent)[:, None, :] == node[None, :, None]) & proposal.is_candidate[:, None]
    rank = jnp.cumsum(is_child, axis=2) - 1
    is_rank = is_child[..., None] & (rank[..., None] == jnp.arange(count)[None, None, None, :])
    token = jnp.max(jnp.where(is_rank, proposal.token[:, None, :, None], -1), axis=2)
    return token.astype(jnp.int32)


def _may_agree(proposal: Proposal, fires: Bool[Array, "B C"], votes: Bool[Array, "B C"]) -> Bool[Array, " B"]:
    """Rows in which some path could agree, so that the head has to run.

    Without `likely`, a path of the proposal agrees only if it ends at a node without children.
    """
    ends = jnp.ones_like(votes) if isinstance(proposal, HintedProposal) else ~votes
    agrees = jnp.all((fires | ~votes)[:, None, :] | ~jnp.asarray(proposal.tree.ancestors), axis=2)
    is_reached = proposal.is_candidate.at[:, 0].set(True)
    return fires[:, 0] & jnp.any(agrees & ends & is_reached, axis=1)


def _top_tokens(model: Model, params: Params, normed: Float[Array, "B C D"]) -> Int[Array, "B C"]:
    """The most probable token at each node."""
    logits = model.read_out(params, normed)
    return argmax_token(logits.reshape(-1, logits.shape[2])).reshape(normed.shape[:2])


def _agrees(
    proposal: Proposal,
    fires: Bool[Array, "B C"],
    votes: Bool[Array, "B C"],
    likely: Int[Array, "B C I"],
    top_token: Int[Array, "B C"],
) -> Bool[Array, " B"]:
    """Rows in which all voting nodes on the path of the most probable tokens from the root are final.

    fires: nodes whose predictor is above the threshold.
    votes: nodes with likely tokens.
    top_token: the layer's own most probable token at each node.
    """
    parent = jnp.broadcast_to(jnp.maximum(jnp.asarray(proposal.tree.parent), 0), top_token.shape)
    follows = proposal.is_candidate & (proposal.token == jnp.take_along_axis(top_token, parent, axis=1))
    follows = follows.at[:, 0].set(True)
    on_path = jnp.all(follows[:, None, :] | ~jnp.asarray(proposal.tree.ancestors), axis=2)
    is_final = fires & jnp.any(likely == top_token[:, :, None], axis=2)
    return jnp.all(is_final | ~votes | ~on_path, axis=1)
