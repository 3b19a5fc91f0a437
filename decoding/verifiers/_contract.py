"""The contract of a verifier: which draft tokens stand, and what comes after them.

    verifier.verify(proposal, logits, draws, seed, position) -> Verdict

`logits` are the target's after every sampling option, at every node: their softmax is the law of the token that follows
the node, exactly the one plain decoding would draw from there.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Key, UInt32

from decodax.decoding.drafters._contract import Children, Drafter, Proposal
from decodax.decoding.random import Draw, draw_keys, gumbel
from decodax.decoding.sampling import Sampling
from decodax.layers import pytree


@pytree.dataclass
class Verdict:
    """node[b]: the last accepted node of row b (0: none but the root). token[b]: what the target says follows it."""

    node: Int[Array, " B"]
    token: Int[Array, " B"]


class Verifier:
    """What `speculative` asks of a verifier. `lossless`: the emitted tokens follow the target's law exactly.

    takes: the kinds of children for which that holds. only_chains: whether a tree with branches is beyond it.
    """

    lossless: ClassVar[bool]
    takes: ClassVar[frozenset[Children]]
    only_chains: ClassVar[bool] = False

    def check(self, sampling: Sampling) -> None:
        """Raises ValueError for sampling options that this verifier cannot honour."""

    def verify(
        self,
        proposal: Proposal,
        logits: Float32[Array, "B C V"],
        draws: bool,
        seed: UInt32[Array, " B"],
        position: Int[Array, "B C"],
    ) -> Verdict:
        """Decides on every row.

        draws: whether any row is sampled at all (static). position: where the token that follows each node will stand,
        which with the row's seed makes the random numbers (`node_keys`).
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it accepts")


def node_keys(seed: UInt32[Array, " B"], position: Int[Array, "B C"], kind: Draw) -> Key[Array, "B C"]:
    """The key of a draw for the token that follows each node.

    Made for all rows and nodes along one axis: random bits over two nested ones take XLA four to eight times as long
    to compile.
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


def check_pair(drafter: Drafter, verifier: Verifier) -> None:
    """Raises ValueError when the verifier's rule would not keep the target's law for this drafter's proposals."""
    name, children = type(verifier).__name__, drafter.children
    if children not in verifier.takes:
        takes = " or ".join(sorted(kind.value for kind in verifier.takes))
        raise ValueError(
            f"{name} keeps the target's law only for children that are {takes}, and those of {type(drafter).__name__} "
            f"are {children.value}: choose another verifier (ExactMatch takes all)"
        )
    if verifier.only_chains and drafter.num_nodes != drafter.max_depth + 1:
        raise ValueError(
            f"{name} verifies chains, and {type(drafter).__name__} drafts a tree of {drafter.num_nodes} nodes and "
            f"depth {drafter.max_depth}: choose a verifier for trees"
        )
