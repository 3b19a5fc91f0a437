"""Defines the contract of a verifier: which draft tokens are accepted, and which token follows them.

    verifier.verify(proposal, logits, do_sample, seed, position) -> Verdict

`logits` are the target's after every sampling option, at every node: their softmax is the distribution of the token
that follows the node, exactly the one that plain decoding would draw from there.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Key, UInt32

from decodax.core import pytree
from decodax.decoding.drafters.contract import Children, Proposal
from decodax.decoding.random import Draw, draw_keys, gumbel
from decodax.decoding.sampling import Sampling


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

    def verify(
        self,
        proposal: Proposal,
        logits: Float32[Array, "B C V"],
        do_sample: bool,
        seed: UInt32[Array, " B"],
        position: Int[Array, "B C"],
    ) -> Verdict:
        """Decides on every row.

        proposal: the tree of draft tokens.
        logits: the target's, after the sampling options, at every node.
        do_sample: whether any row is sampled (static).
        seed: one per row.
        position: of the token that follows each node; with the row's seed it makes the random numbers (`node_keys`).
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it accepts")


def node_keys(seed: UInt32[Array, " B"], position: Int[Array, "B C"], kind: Draw) -> Key[Array, "B C"]:
    """The key of a draw for the token that follows each node.

    All rows and nodes are along one axis: random bits over two nested axes take XLA four to eight times as long to
    compile.
    """
    keys = draw_keys(jnp.repeat(seed, position.shape[1]), position.reshape(-1), kind)
    return keys.reshape(position.shape)


def token_noise(seed: UInt32[Array, " B"], position: Int[Array, "B C"], vocab_size: int) -> Float32[Array, "B C V"]:
    """The Gumbel noise with which plain decoding draws the token at each position."""
    keys = node_keys(seed, position, Draw.TOKEN).reshape(-1)
    return gumbel(keys, (vocab_size,)).reshape(*position.shape, vocab_size)


def at_node(values: Array, node: Int[Array, " B"]) -> Array:
    """values[b, node[b]] for arrays [B, C, ...]."""
    index = node.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.take_along_axis(values, index, axis=1)[:, 0]
