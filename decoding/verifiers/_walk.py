"""Runs rejection sampling on a tree: tries the children of a node in order and descends into an accepted one.

At a node the walk begins with the target distribution there. A child is accepted with some probability; each rejection
changes the target distribution (to the residual one), and when no child is left, the token after the path is drawn from
it. Rules differ only in the acceptance probability and in what a rejection changes: a subclass of `TreeRule` defines
both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.decoding.drafters.contract import Proposal
from decodax.decoding.node_random import NodeRandom
from decodax.decoding.verifiers.contract import Verdict, Verifier, at_node


class TreeRule(Verifier):
    """A verifier that defines, for one row, what happens when a child is tried.

    target_probs: at first the target distribution at the node, then the residual distribution.
    logprobs: log-probabilities from which the next child was drawn, at first the drafter's at the node; None where
        children are chosen.
    """

    def acceptance(
        self, target_probs: Float[Array, " V"], logprobs: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> Float[Array, ""]:
        """The probability of accepting the child."""
        raise NotImplementedError(f"{type(self).__name__} must define the acceptance probability of a child")

    def reject(
        self, target_probs: Float[Array, " V"], logprobs: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> tuple[Float[Array, " V"], Float[Array, " V"] | None]:
        """`target_probs` and `logprobs` after the child was rejected."""
        raise NotImplementedError(f"{type(self).__name__} must define what a rejection changes")

    def verify(self, proposal: Proposal, logits: Float32[Array, "B C V"], rng: NodeRandom) -> Verdict:
        end = walk(self, proposal, logits, rng.uniform())
        return Verdict(end.node, rng.draw(end.node, end.target_probs))


class Walk(NamedTuple):
    """The state of a walk.

    node: the last accepted node of each row.
    target_probs, logprobs: the distributions of `TreeRule` there.
    child: the one to try next, 0 where none is left.
    """

    node: Int[Array, " B"]
    target_probs: Float32[Array, "B V"]
    logprobs: Float32[Array, "B V"] | None
    child: Int[Array, " B"]


def walk(rule: TreeRule, proposal: Proposal, logits: Float32[Array, "B C V"], uniform: Float32[Array, "B C"]) -> Walk:
    """Tries one child in every row per step, until no row has any left: as many steps as the longest walk has tries.

    rule: what trying a child does.
    proposal: the tree of draft tokens.
    logits: the target's, at every node.
    uniform: the number that decides each node's acceptance.
    """

    def arrive(node: Int[Array, " B"]) -> Walk:
        logprobs = None if proposal.logprobs is None else at_node(proposal.logprobs, node)
        return Walk(node, jax.nn.softmax(at_node(logits, node), axis=1), logprobs, _next_child(proposal, node, node))

    def try_child(walk: Walk) -> Walk:
        token, is_tried = at_node(proposal.token, walk.child), walk.child > 0
        is_accepted = at_node(uniform, walk.child) < jax.vmap(rule.acceptance)(walk.target_probs, walk.logprobs, token)
        target_probs, logprobs = jax.vmap(rule.reject)(walk.target_probs, walk.logprobs, token)
        rejected = Walk(walk.node, target_probs, logprobs, _next_child(proposal, walk.node, walk.child))
        return _where(is_tried, _where(is_accepted, arrive(walk.child), rejected), walk)

    root = jnp.zeros(logits.shape[0], jnp.int32)
    return lax.while_loop(lambda walk: jnp.any(walk.child > 0), try_child, arrive(root))


def _next_child(proposal: Proposal, node: Int[Array, " B"], tried: Int[Array, " B"]) -> Int[Array, " B"]:
    """The first child of `node` numbered after `tried`, as siblings are numbered in the order they were drawn."""
    number = jnp.arange(proposal.token.shape[1], dtype=jnp.int32)[None, :]
    is_child = (jnp.asarray(proposal.tree.parent) == node[:, None]) & proposal.is_candidate
    return jnp.argmax(is_child & (number > tried[:, None]), axis=1).astype(jnp.int32)


def _where(is_true: Bool[Array, " B"], walk: Walk, otherwise: Walk) -> Walk:
    """`walk` in the rows where `is_true`, `otherwise` in the others."""
    return jax.tree.map(lambda a, b: jnp.where(is_true.reshape(-1, *[1] * (a.ndim - 1)), a, b), walk, otherwise)
