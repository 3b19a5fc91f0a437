"""The one place where activations meet a weight matrix.

Every projection of every layer goes through `linear`, so that another kind of weight (quantised, low-rank, sharded in a
special way) is one more case here and nowhere else.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(
    inputs: Float[Array, "*batch in_"],
    weight: Float[Array, "out in_"],
    bias: Float[Array, " out"] | None = None,
    *,
    output_dtype: jnp.dtype | None = None,
) -> Float[Array, "*batch out"]:
    """inputs times weight transposed, plus bias; the weight is [outputs, inputs], the result in `output_dtype`.

    The product is written with two-dimensional operands: XLA's CPU backend then reads the weight in place.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    product = jax.lax.dot_general(
        rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=output_dtype or inputs.dtype
    )
    product = product.reshape(*inputs.shape[:-1], weight.shape[0])
    return product if bias is None else product + bias.astype(product.dtype)
