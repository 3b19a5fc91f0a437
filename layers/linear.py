"""The one place where activations meet a weight matrix.

Every projection of every layer goes through `linear`, so that another kind of weight (quantised, low-rank, sharded in a
special way) is one more case here and nowhere else.
"""

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def linear(
    inputs: Float[Array, "*batch in_"],
    weight: Float[Array, "out in_"],
    bias: Float[Array, " out"] | None = None,
    *,
    output_dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out"]:
    """inputs times weight transposed, plus bias; the weight is [outputs, inputs], the result in `output_dtype`.

    The product is written with two-dimensional operands: XLA's CPU backend then reads the weight in place. That
    backend repacks the second operand of a matrix product at every call, so there the weight comes first: measured 1.2
    to 2 times faster for 2 to 64 rows. The barrier keeps XLA from swapping the operands back.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    over_last = (((1,), (1,)), ((), ()))
    dtype = output_dtype or inputs.dtype
    if rows.shape[0] > 1 and jax.default_backend() == "cpu":
        product = jax.lax.dot_general(weight, rows, over_last, preferred_element_type=dtype)
        product = jax.lax.optimization_barrier(product).T
    else:
        product = jax.lax.dot_general(rows, weight, over_last, preferred_element_type=dtype)
    product = product if bias is None else product + bias.astype(product.dtype)[None, :]
    return product.reshape(*inputs.shape[:-1], weight.shape[0])
