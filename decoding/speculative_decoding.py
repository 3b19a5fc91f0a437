"""Speculative decoding: a drafter proposes tokens, one target forward verifies them, a verifier accepts some.

One round of the compiled loop: the drafter proposes a tree of tokens after the last one; the target runs once over the
tree; the verifier accepts a path from the root and adds one token of the target's own (the bonus token); the cache
updates of the accepted nodes are committed. A chain is a tree with one branch, and plain decoding is the tree of one
node. Random numbers depend on each row's seed and positions only, so a row's result does not depend on its batch.

Papers: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192; Accelerating Large Language Model
Decoding with Speculative Sampling, arXiv 2302.01318; SpecInfer (trees), arXiv 2305.09781.

    decode = speculative(model, drafter, verifier)
    state = jax.jit(decode, donate_argnums=2)(params, draft_params, state)
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from decodax.decoding.draft_counts import DraftCounts
from decodax.decoding.drafters.contract import Drafter, Outcome, Proposal
from decodax.decoding.early_exit import AllLayers, LayerPolicy
from decodax.decoding.loop import run_until_done
from decodax.decoding.node_random import NodeRandom
from decodax.decoding.proposal_check import check_kept, check_pair, checked_proposal, describe
from decodax.decoding.sampling import has_choice, token_logprob
from decodax.decoding.state import DecodeState
from decodax.decoding.tree_logits import node_history, node_logits
from decodax.decoding.verifiers.contract import Verifier
from decodax.models.model import Model, Params, commit

ALL_LAYERS = AllLayers()


@dataclass(frozen=True)
class Speculative:
    """`decode(params, draft_params, state, max_tokens=None)`; make it with `speculative`."""

    model: Model
    drafter: Drafter
    verifier: Verifier
    layer_policy: LayerPolicy = ALL_LAYERS

    def __call__(
        self, params: Params, draft_params: Any, state: DecodeState, max_tokens: Int[Array, ""] | int | None = None
    ) -> DecodeState:
        """Continues every row until all are done, or until some row has `max_tokens` more (or a few above that).

        A state without a drafter's state is started first (`start`). Raises ValueError for one that another drafter
        has started.
        """
        if state.draft is None:
            state = self.start(params, draft_params, state)
        elif state.started_by != describe(self.drafter):
            raise ValueError(
                f"this state was started by {state.started_by}, and cannot go on with {describe(self.drafter)}: "
                "prefill again, or decode with the first"
            )
        step = lambda state: self.step(params, draft_params, state)
        return run_until_done(step, state, max_tokens, self.model.execution)

    def start(self, params: Params, draft_params: Any, state: DecodeState) -> DecodeState:
        """The state with the drafter's own, which has prefilled the prompts, and with counts at zero.

        A tree may be larger than the buffers: what would not fit is past the end of every row, and is dropped.

        Raises ValueError when the draft parameters do not fit, or the verifier cannot honour a sampling option.
        """
        drafter = self.drafter
        drafter.check(self.model, draft_params)
        self.verifier.check(state.sampling)
        draft = drafter.constrained(drafter.start(params, draft_params, state), self.model)
        counts = DraftCounts.zero(drafter.max_depth)
        return dataclasses.replace(state, draft=draft, counts=counts, started_by=describe(drafter))

    def constrained(self, state: DecodeState) -> DecodeState:
        """The state with sharding constraints: the target's, and for the drafter's state its own."""
        draft = self.drafter.constrained(state.draft, self.model)
        return dataclasses.replace(
            self.model.execution.constrained(dataclasses.replace(state, draft=None)), draft=draft
        )

    def step(self, params: Params, draft_params: Any, state: DecodeState) -> DecodeState:
        """One round."""
        counts, begun = state.counts, state.draft
        assert counts is not None
        with jax.named_scope(type(self.drafter).__name__):
            proposed = self.drafter.propose(params, draft_params, state)
            proposal, draft = checked_proposal(self.drafter, proposed, state, self.model)
        tree = proposal.tree
        depth = jnp.broadcast_to(jnp.asarray(tree.depth), proposal.token.shape)
        position = state.length[:, None] - 1 + depth
        reached = self.layer_policy.forward(self.model, params, state, proposal, position, self.drafter.capture)
        forward = reached.forward
        logits = self.model.logits(params, forward.hidden)
        with jax.named_scope(type(self.verifier).__name__):
            target_logits = node_logits(state.sampling, logits, node_history(state.history, tree, proposal.token))
            if state.sampling.do_sample:
                rng = NodeRandom(state.seed, state.length[:, None] + depth, self.drafter.max_depth, tree.is_chain)
                verdict = self.verifier.verify(proposal, target_logits, rng)
            else:
                verdict = self.verifier.verify_greedy(proposal, target_logits)
        path = tree.path_to(verdict.node, self.drafter.max_depth)
        num_accepted = jnp.take_along_axis(depth, verdict.node[:, None], axis=1)[:, 0]
        token, logprob = _block(proposal, logits, path, num_accepted, verdict.token)
        # Tokens up to the first non-finite logprob are kept. So the commit depends on the forward's result, which lets
        # XLA write in place (see KVCache.commit).
        offset = jnp.arange(token.shape[1], dtype=jnp.int32)[None, :]
        is_left = jnp.broadcast_to(has_choice(state.sampling, target_logits), proposal.token.shape)
        is_finite = jnp.isfinite(logprob) & jnp.take_along_axis(is_left, path, axis=1)
        is_nonfinite = ~is_finite & (offset <= num_accepted[:, None])
        num_finite = jnp.min(jnp.where(is_nonfinite, offset, num_accepted[:, None] + 1), axis=1)
        caches = state.caches
        state, emitted = state.append(token, logprob, num_finite)
        failed = ~state.done & (num_finite <= num_accepted)  # not a row that ended before the non-finite token
        state = dataclasses.replace(
            state,
            caches=commit(caches, forward.cache_updates, emitted, None if tree.is_chain else path),
            failed=state.failed | failed,
            done=state.done | failed,
            num_target_forwards=state.num_target_forwards + 1,
            layer_counts=state.layer_counts.add(reached.layers_run, reached.row_layers, emitted > 0),
            layer_policy=reached.state,
            draft=draft,
            counts=counts.add(tree, proposal.is_candidate, path, num_accepted, emitted, proposal.num_draft_forwards),
        )
        outcome = Outcome(proposal, logits, forward, path, emitted)
        draft = self.drafter.update(params, draft_params, state, outcome)
        check_kept(self.drafter, begun, draft)
        return dataclasses.replace(state, draft=self.drafter.constrained(draft, self.model))


def speculative(
    model: Model, drafter: Drafter, verifier: Verifier, layer_policy: LayerPolicy = ALL_LAYERS
) -> Speculative:
    """A decoding function in which `drafter` proposes tokens for `model` and `verifier` decides which are accepted.

    model: the target.
    drafter, verifier: how tokens are proposed and accepted.
    layer_policy: which of the target's layers run, all by default; one that is not `AllLayers` needs a state that was
        made with it (`decoding.prefill(..., layer_policy=)`).

    Raises ValueError when one of them is no drafter or verifier as the contracts ask for, or the verifier's rule does
    not hold for this drafter's proposals.
    """
    check_pair(drafter, verifier)
    return Speculative(model, drafter, verifier, layer_policy)


def _block(
    proposal: Proposal,
    logits: Float32[Array, "B C V"],
    path: Int[Array, "B A"],
    num_accepted: Int[Array, " B"],
    next_token: Int[Array, " B"],
) -> tuple[Int[Array, "B A"], Float32[Array, "B A"]]:
    """The accepted tokens, then the target's own, and their logprobs; what follows is ignored."""
    shifted = jnp.concatenate([path[:, 1:], path[:, -1:]], axis=1)
    is_draft = jnp.arange(path.shape[1])[None, :] < num_accepted[:, None]
    token = jnp.where(is_draft, jnp.take_along_axis(proposal.token, shifted, axis=1), next_token[:, None])
    return token, token_logprob(jnp.take_along_axis(logits, path[:, :, None], axis=1), token)
