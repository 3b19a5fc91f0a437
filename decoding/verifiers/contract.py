"""Defines the contract of a verifier: which draft tokens are accepted, and which token follows them.

    verifier.verify(proposal, logits, rng) -> Verdict

`logits` are the target's after every sampling option, at every node: their softmax is the distribution of the token
that follows the node, exactly the one that plain decoding would draw from there. In a greedy row it has all its
probability on one token. A batch without a sampled row goes to `verify_greedy` instead.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from decodax.core import pytree
from decodax.decoding.drafters.contract import Children, Proposal
from decodax.decoding.node_random import NodeRandom
from decodax.decoding.sampling import Sampling
from decodax.decoding.top_tokens import argmax_token


@pytree.dataclass
class Verdict:
    """The verifier's decision.

    node[b]: the last accepted node of row b (0: the root alone).
    token[b]: the target's own token after it (the bonus token).
    """

    node: Int[Array, " B"]
    token: Int[Array, " B"]


class Verifier:
    """What `speculative` needs of a verifier.

    lossless: the emitted tokens follow the target distribution exactly.
    supported_children: how children may be found for that to hold.
    only_chains: whether it rejects trees with branches.
    """

    lossless: ClassVar[bool]
    supported_children: ClassVar[frozenset[Children]]
    only_chains: ClassVar[bool] = False

    def check(self, sampling: Sampling) -> None:
        """Raises ValueError for sampling options that this verifier cannot honour."""
        if sampling.do_sample and type(self).verify is Verifier.verify:
            raise ValueError(
                f"{type(self).__name__} verifies greedy rows only (it defines no `verify`), got a temperature above 0: "
                "set it to 0, or choose another verifier"
            )

    def verify(self, proposal: Proposal, logits: Float32[Array, "B C V"], rng: NodeRandom) -> Verdict:
        """Decides on every row of a batch in which some row is sampled.

        proposal: the tree of draft tokens.
        logits: the target's, after the sampling options, at every node.
        rng: the random numbers of this round.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it accepts of sampled rows")

    def verify_greedy(self, proposal: Proposal, logits: Float32[Array, "B C V"]) -> Verdict:
        """Decides on every row of a batch at temperature 0: by default, it accepts what the argmax agrees with."""
        return follow_argmax(proposal, logits)


def follow_argmax(proposal: Proposal, scores: Float32[Array, "B C V"]) -> Verdict:
    """`follow_tokens` with the argmax at every node."""
    return follow_tokens(proposal, jax.vmap(argmax_token, in_axes=1, out_axes=1)(scores))


def follow_tokens(proposal: Proposal, token: Int[Array, "B C"]) -> Verdict:
    """Accepts child x of node u if x = token[u]; the token after the last accepted node is `token` there."""
    matches = proposal.token == jnp.take_along_axis(token, proposal.parent, axis=1)
    node = proposal.tree.accepted_path(matches & proposal.is_candidate)
    return Verdict(node, at_node(token, node))


def at_node(values: Array, node: Int[Array, " B"]) -> Array:
    """values[b, node[b]] for arrays [B, C, ...]."""
    index = node.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.take_along_axis(values, index, axis=1)[:, 0]
