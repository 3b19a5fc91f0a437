"""Makes random numbers for decoding from a row's own seed and a token's absolute position only.

The key of a draw is the row's seed, folded with the absolute position of the token being drawn, folded with the kind of
draw. There is no running random state, so a row draws the same numbers alone or in a batch, in one block of tokens or
in many, and after being moved to another slot.
"""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Key, UInt32

# Fixed, because `jax_default_prng_impl` is a user's global setting and must not change what a seed means.
GENERATOR = "threefry2x32"


class Draw(enum.IntEnum):
    """What a random number is for. Two kinds at one position are independent; the values are part of what a seed means,
    so a new kind takes a new number and no number is ever reused."""

    TOKEN = 0
    DRAFT = 1  # what a drafter proposes
    ACCEPT = 2  # whether a verifier accepts it


def fold_seed(seed: int, prompt: int, sample: int = 0) -> int:
    """The seed of a prompt's sample, by their places from 0; the first of the first prompt has the seed itself.

    Sample k of prompt i: fold_seed(fold_seed(seed, i), 0, k). No version of NumPy changes it.
    """
    if prompt == sample == 0:
        return seed
    return int(np.random.SeedSequence(seed, spawn_key=(prompt, sample)).generate_state(1, np.uint32)[0])


def draw_keys(seed: UInt32[Array, "B"], position: Int32[Array, "B"], kind: Draw) -> Key[Array, "B"]:
    """One key per row: seed, absolute position of the token being drawn (prompt included, from 0), kind of draw."""

    def row_key(row_seed: Array, row_position: Array) -> Array:
        key = jax.random.key(row_seed, impl=GENERATOR)
        return jax.random.fold_in(jax.random.fold_in(key, row_position), int(kind))

    return jax.vmap(row_key)(seed, position)


def gumbel(keys: Key[Array, "B"], shape_per_row: tuple[int, ...]) -> Float32[Array, "B ..."]:
    """Standard Gumbel noise, `shape_per_row` of it for each key: `argmax(log p + gumbel)` is a draw from p.

    Made from all 32 random bits of a word. `jax.random.gumbel` keeps 23 of them by default, which cuts the upper tail
    at 16 and lets the two best of 150,000 near-equal tokens tie in one draw of a hundred, so that the lower id wins;
    here the tail reaches 22.8, at the same cost. It is written out here so that a seed also gives the same tokens on
    every version of JAX.
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, shape_per_row, jnp.uint32))(keys)
    # Uniform in (0, 1), fine near 0, where the large Gumbel values come from; below 1, so that the logarithm is finite.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))
