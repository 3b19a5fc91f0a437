"""Computes router logits: one product in float32, as choices must not depend on the tokens' dtype."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from decodax.core.linear import linear


def router_logits(tokens: Float[Array, "B T D"], weights: dict[str, Any]) -> Float32[Array, "B T E"]:
    """tokens weight^T, plus `bias` if there is one, exactly in float32."""
    bias = weights.get("bias")
    with jax.default_matmul_precision("highest"):
        wide = tokens.astype(jnp.float32), weights["weight"].astype(jnp.float32)
        return linear(*wide, None if bias is None else bias.astype(jnp.float32))
