"""Learned sinks: a score per head that takes part in the softmax and has no value (gpt-oss, arXiv 2508.10925).

With lse the log-sum-exp of the scores of the tokens that a query reads, exp(lse) / (exp(lse) + exp(sink)) of the plain
mixture is left. So a sink is applied after attention, whatever computed it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def without_share(
    output: Float[Array, "B T N H"], lse: Float[Array, "B T N"], sink: Float[Array, " N"] | None
) -> Float[Array, "B T N H"]:
    """The output once each head's sink has taken its share; unchanged without sinks."""
    if sink is None:
        return output
    share = jax.nn.sigmoid(lse - sink.astype(jnp.float32)[None, None, :])
    return (output.astype(jnp.float32) * share[..., None]).astype(output.dtype)
