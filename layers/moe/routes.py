"""Which experts each token chose, and with what weight: all that the rest of a mixture of experts hears of its router.

What a layer hands back as its record is the same, with a count of what its exchange could not take at once.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from decodax.layers import pytree


@pytree.dataclass
class Routes:
    """expert: of each choice, -1 where a token has fewer than X. gate: what the expert's output is multiplied with.

    num_overflowed: choices that did not fit into the first round of an exchange between devices, and went with later
    ones. None are left out. A choice of an expert that is cut into slices counts once for each.
    """

    expert: Int[Array, "*batch X"]
    gate: Float32[Array, "*batch X"]
    num_overflowed: Int[Array, ""]

    @classmethod
    def of(cls, expert: Int[Array, "*batch X"], gate: Float32[Array, "*batch X"]) -> "Routes":
        """Routes fresh from a router."""
        return cls(expert.astype(jnp.int32), gate, jnp.zeros((), jnp.int32))
