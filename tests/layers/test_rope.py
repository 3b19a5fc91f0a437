"""Rotary frequencies and angles equal a float64 oracle written from the papers, independent of the code."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
    rotate,
)

SIZE, BASE, ORIGINAL = 14, 100.0, 32
SHORT = (1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.6)
LONG = (1.5, 2.0, 3.0, 4.5, 6.0, 8.0, 11.0)
POSITIONS = [0, 1, 2, 30, 31, 32, 33, 63, 100]
# Frequencies carry at most three float32 roundings (3 x 6e-8 relative) and are multiplied by positions up to 100; cos
# and sin add one rounding of a number up to 2.
ANGLE_TOLERANCE = 100 * 3 * 6e-8 + 2 * 6e-8


def plain(j, base=BASE):
    return base ** (-2.0 * j / SIZE)


def yarn(j, factor, beta_fast, beta_slow, truncate):
    """Keeps pair j if it turns more than beta_fast times in the original length, divides it below beta_slow turns."""

    def pair_that_turns(times):  # solves original x base^(-2 j / size) = 2 pi times for j
        return SIZE / 2 * math.log(ORIGINAL / (2 * math.pi * times), BASE)

    first, last = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, SIZE - 1)
    share = min(max((j - first) / (last - first), 0.0), 1.0)
    return plain(j) / factor * share + plain(j) * (1 - share)


def llama3(j, factor, low, high):
    """Three bands by wavelength, as in the Llama 3.1 release."""
    wavelength = 2 * math.pi / plain(j)
    if wavelength < ORIGINAL / high:
        return plain(j)
    if wavelength > ORIGINAL / low:
        return plain(j) / factor
    smooth = (ORIGINAL / wavelength - low) / (high - low)
    return (1 - smooth) * plain(j) / factor + smooth * plain(j)


def dynamic(j, factor, length):
    stretch = factor * max(length, ORIGINAL) / ORIGINAL - (factor - 1)
    return plain(j, BASE * stretch ** (SIZE / (SIZE - 2)))


# name -> (the scaling, oracle: (pair, row length) -> frequency, what multiplies cos and sin)
CASES = {
    "plain": (None, lambda j, length: plain(j), 1.0),
    "linear": (LinearScaling(3.0), lambda j, length: plain(j) / 3.0, 1.0),
    "dynamic": (DynamicScaling(3.0, ORIGINAL), lambda j, length: dynamic(j, 3.0, length), 1.0),
    "llama3": (Llama3Scaling(8.0, 1.0, 4.0, ORIGINAL), lambda j, length: llama3(j, 8.0, 1.0, 4.0), 1.0),
    "yarn": (YarnScaling(4.0, ORIGINAL, 1.2, 3.0, 0.5), lambda j, length: yarn(j, 4.0, 3.0, 0.5, True), 1.2),
    "yarn exact": (
        YarnScaling(4.0, ORIGINAL, 0.9, 3.0, 0.5, truncate=False),
        lambda j, length: yarn(j, 4.0, 3.0, 0.5, False),
        0.9,
    ),
    "longrope": (
        LongRopeScaling(SHORT, LONG, ORIGINAL, 1.3),
        lambda j, length: plain(j) / (LONG if length > ORIGINAL else SHORT)[j],
        1.3,
    ),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("name", CASES)
def test_angles(name, jitted):
    scaling, frequency, magnitude = CASES[name]
    position = np.array([POSITIONS, POSITIONS[::-1]], np.int32)
    row_length = np.array([[5], [200]], np.int32) + np.zeros_like(position)
    row_length[0, 3:6] = [31, 32, 33]  # the edge of the original length
    angles = Rope(SIZE, BASE, scaling).angles
    cos, sin = (jax.jit(angles) if jitted else angles)(jnp.asarray(position), jnp.asarray(row_length))
    assert cos.dtype == sin.dtype == jnp.float32
    for (row, column), where in np.ndenumerate(position):
        for j in range(SIZE // 2):
            angle = where * frequency(j, row_length[row, column])
            assert cos[row, column, j] == pytest.approx(magnitude * math.cos(angle), rel=0, abs=ANGLE_TOLERANCE)
            assert sin[row, column, j] == pytest.approx(magnitude * math.sin(angle), rel=0, abs=ANGLE_TOLERANCE)


def test_frequencies_are_rounded_as_pytorch_rounds():
    """1 / base ** (arange(0, size, 2) / size) in PyTorch, where it is not the float32 nearest to the exact value.

    For one size the power and its inverse are what rounds, for the other the exponent too.
    """
    expected = {
        (128, 500000.0): {2: 0.663601279258728, 4: 0.44036662578582764, 8: 0.193922758102417, 10: 0.12868738174438477},
        (96, 10000.0): {8: 0.2154434472322464, 11: 0.12115275114774704, 14: 0.06812921166419983},
    }
    for (size, base), values in expected.items():
        frequencies = Rope(size, base).plain_frequencies()
        np.testing.assert_array_equal(frequencies[list(values)], np.float32(list(values.values())))


def test_dynamic_is_plain_within_the_original_length():
    position = jnp.arange(ORIGINAL, dtype=jnp.int32)[None, :]
    row_length = jnp.full_like(position, ORIGINAL)
    stretched = Rope(SIZE, BASE, DynamicScaling(3.0, ORIGINAL)).angles(position, row_length)
    unscaled = Rope(SIZE, BASE).angles(position, row_length)
    np.testing.assert_array_equal(stretched[0], unscaled[0])
    np.testing.assert_array_equal(stretched[1], unscaled[1])


@pytest.mark.parametrize("head_size", [SIZE, SIZE + 3])
def test_rotate_turns_pairs_and_passes_the_rest(head_size):
    generator = np.random.default_rng(0)
    heads = generator.normal(size=(2, 3, 5, head_size)).astype(np.float32)
    angle = generator.uniform(0, 7, size=(2, 3, SIZE // 2))
    cos, sin = (jnp.asarray(f(angle), jnp.float32) for f in (np.cos, np.sin))
    rotated = np.asarray(rotate(jnp.asarray(heads), cos, sin))
    half = SIZE // 2
    turned = (heads[..., :half] + 1j * heads[..., half:SIZE]) * np.exp(1j * angle)[:, :, None, :]
    expected = np.concatenate([turned.real, turned.imag, heads[..., SIZE:]], axis=-1)
    np.testing.assert_allclose(rotated, expected, rtol=0, atol=4 * 6e-8 * np.abs(heads).max())


def test_rotary_size_must_be_even():
    with pytest.raises(ValueError, match=r"rotary_size must be even and positive .*got 7"):
        Rope(7, BASE)
