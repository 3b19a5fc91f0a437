"""Applies learned sinks: a score per head that is in the softmax and has no value (gpt-oss, arXiv 2508.10925).

With lse the log-sum-exp of the scores of a query, its attention output is multiplied by
exp(lse) / (exp(lse) + exp(sink)). So a sink is applied after attention, whatever computed it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def without_share(
    output: Float[Array, "B T N H"], lse: Float[Array, "B T N"], sink: Float[Array, " N"] | None
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """The output with the share of each head's sink taken off, and the log-sum-exp with it; unchanged without sinks."""
    if sink is None:
        return output, lse
    score = sink.astype(jnp.float32)[None, None, :]
    share = jax.nn.sigmoid(lse - score)
    return (output.astype(jnp.float32) * share[..., None]).astype(output.dtype), jnp.logaddexp(lse, score)
