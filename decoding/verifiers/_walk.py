"""The walk of rejection rules on a tree: try the children of a node one after the other, go into the one that is taken.

At a node the walk begins with the target's law there. A child is taken with some probability; each one refused changes
the law that is still wanted, and when none is left the token after the path is drawn from that law. Rules differ only
in how likely a child is taken and what a refusal changes: a subclass of `TreeRule` says these two.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32

from decodax.decoding.drafters._contract import Proposal
from decodax.decoding.verifiers._acceptance import acceptance_draws, draw_after
from decodax.decoding.verifiers._contract import Verdict, Verifier, at_node
from decodax.decoding.verifiers._matching import follow_largest


class TreeRule(Verifier):
    """A verifier that says, for one row, what trying a child does.

    wanted: the law still wanted at the node, at first the target's. law: log-probabilities from which the next child
    was drawn, at first the drafter's at the node; None where children are chosen.
    """

    def acceptance(
        self, wanted: Float[Array, " V"], law: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> Float[Array, ""]:
        """The probability with which the child is taken."""
        raise NotImplementedError(f"{type(self).__name__} must say how likely a child is taken")

    def refuse(
        self, wanted: Float[Array, " V"], law: Float[Array, " V"] | None, token: Int[Array, ""]
    ) -> tuple[Float[Array, " V"], Float[Array, " V"] | None]:
        """`wanted` and `law` for what comes after the child, which has been refused."""
        raise NotImplementedError(f"{type(self).__name__} must say what a refusal changes")

    def verify(
        self,
        proposal: Proposal,
        logits: Float32[Array, "B C V"],
        draws: bool,
        seed: UInt32[Array, " B"],
        position: Int[Array, "B C"],
    ) -> Verdict:
        if not draws:
            return follow_largest(proposal, logits)
        end = walk(self, proposal, logits, acceptance_draws(proposal, seed, position))
        return draw_after(end.node, end.wanted, seed, position)


class Walk(NamedTuple):
    """Where every row stands, the two laws of `TreeRule` there, and the child to try next, 0 where none is left."""

    node: Int[Array, " B"]
    wanted: Float32[Array, "B V"]
    law: Float32[Array, "B V"] | None
    child: Int[Array, " B"]


def walk(rule: TreeRule, proposal: Proposal, logits: Float32[Array, "B C V"], uniform: Float32[Array, "B C"]) -> Walk:
    """Tries one child in every row per step, until no row has any left: as many steps as the longest walk has tries."""

    def arrive(node: Int[Array, " B"]) -> Walk:
        law = None if proposal.law is None else at_node(proposal.law, node)
        return Walk(node, jax.nn.softmax(at_node(logits, node), axis=1), law, _next_child(proposal, node, node))

    def try_child(walk: Walk) -> Walk:
        token, is_tried = at_node(proposal.token, walk.child), walk.child > 0
        is_taken = at_node(uniform, walk.child) < jax.vmap(rule.acceptance)(walk.wanted, walk.law, token)
        wanted, law = jax.vmap(rule.refuse)(walk.wanted, walk.law, token)
        refused = Walk(walk.node, wanted, law, _next_child(proposal, walk.node, walk.child))
        return _rows(is_tried, _rows(is_taken, arrive(walk.child), refused), walk)

    root = jnp.zeros(logits.shape[0], jnp.int32)
    return lax.while_loop(lambda walk: jnp.any(walk.child > 0), try_child, arrive(root))


def _next_child(proposal: Proposal, node: Int[Array, " B"], tried: Int[Array, " B"]) -> Int[Array, " B"]:
    """The first child of `node` behind the node `tried`, as siblings are numbered in the order they were drawn."""
    number = jnp.arange(proposal.token.shape[1], dtype=jnp.int32)[None, :]
    is_child = (jnp.asarray(proposal.tree.parent) == node[:, None]) & proposal.is_candidate
    return jnp.argmax(is_child & (number > tried[:, None]), axis=1).astype(jnp.int32)


def _rows(where: Bool[Array, " B"], there: Walk, elsewhere: Walk) -> Walk:
    """The rows of one or of the other."""
    return jax.tree.map(lambda a, b: jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b), there, elsewhere)
