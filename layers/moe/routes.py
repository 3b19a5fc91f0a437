"""Defines the routes of tokens: the experts and gates that a router returns.

A layer returns its routes too, with a count of the choices that did not fit into the first round of its exchange.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from decodax.core import pytree


@pytree.dataclass
class Routes:
    """The routes of tokens.

    expert: of each choice, -1 where a token has fewer than X.
    gate: multiplies the expert's output.
    num_overflowed: choices that did not fit into the first round of an exchange between devices, and were sent in later
        rounds; none are dropped. A choice of an expert that is cut into slices counts once for each.
    """

    expert: Int[Array, "*batch X"]
    gate: Float32[Array, "*batch X"]
    num_overflowed: Int[Array, ""]

    @classmethod
    def of(cls, expert: Int[Array, "*batch X"], gate: Float32[Array, "*batch X"]) -> "Routes":
        """The routes that a router returns."""
        return cls(expert.astype(jnp.int32), gate, jnp.zeros((), jnp.int32))
