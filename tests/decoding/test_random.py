"""Random draws depend only on the row's seed, the position and the kind; Gumbel noise has its distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from decodax.decoding.random import Draw, draw_keys, gumbel

SEED = np.array([0, 1, 2**32 - 1, 7, 7], np.uint32)
POSITION = np.array([0, 5, 131_071, 5, 6], np.int32)
VOCABULARY = 13


def threefry(key, count):
    """Threefry-2x32 with 20 rounds (Salmon and others, Parallel Random Numbers: As Easy as 1, 2, 3, 2011)."""
    mask = 2**32 - 1
    schedule = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    left, right = (count[0] + schedule[0]) & mask, (count[1] + schedule[1]) & mask
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            left = (left + right) & mask
            right = ((right << distance) | (right >> (32 - distance))) & mask
            right ^= left
        left = (left + schedule[(group + 1) % 3]) & mask
        right = (right + schedule[(group + 2) % 3] + group + 1) & mask
    return left, right


def expected_key(seed, position, kind):
    return threefry(threefry((0, int(seed)), (0, int(position))), (0, int(kind)))


def expected_gumbel(key, size):
    words = [threefry(key, (0, index)) for index in range(size)]
    bits = np.array([left ^ right for left, right in words], np.float64)
    return -np.log(-np.log1p(-(bits + 0.5) / 2**32))


def keys_of(seed, position):
    return draw_keys(jnp.asarray(seed), jnp.asarray(position), Draw.TOKEN)


@jax.jit
def noise_of(seed, position):
    return gumbel(draw_keys(seed, position, Draw.TOKEN), (VOCABULARY,))


def test_a_key_is_seed_then_position_then_kind():
    expected = [expected_key(seed, position, Draw.TOKEN) for seed, position in zip(SEED, POSITION, strict=True)]
    np.testing.assert_array_equal(jax.random.key_data(keys_of(SEED, POSITION)), expected)
    assert len(set(expected)) == len(expected)


def test_the_numbers_of_kinds_are_fixed():
    assert {kind.name: kind.value for kind in Draw} == {"TOKEN": 0, "DRAFT": 1, "ACCEPT": 2}


def test_a_seed_gives_the_same_draws_whatever_the_default_generator():
    expected = jax.random.key_data(keys_of(SEED, POSITION))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(jax.random.key_data(keys_of(SEED, POSITION)), expected)


def test_gumbel_noise_is_the_formula_of_random_words():
    expected = [
        expected_gumbel(expected_key(seed, position, 0), VOCABULARY)
        for seed, position in zip(SEED, POSITION, strict=True)
    ]
    # Where the noise is near 0, -log1p(-u) is near 1, rounded to 2**-24, and its logarithm is off by as much.
    for noise in (noise_of(SEED, POSITION), gumbel(keys_of(SEED, POSITION), (VOCABULARY,))):
        np.testing.assert_allclose(noise, expected, rtol=2**-21, atol=2**-21)


def test_a_row_draws_the_same_alone_and_in_a_batch():
    together = np.asarray(noise_of(SEED, POSITION))
    for row in range(len(SEED)):
        np.testing.assert_array_equal(noise_of(SEED[row : row + 1], POSITION[row : row + 1])[0], together[row])


def test_gumbel_has_the_requested_shape_and_an_own_word_per_entry():
    noise = np.asarray(gumbel(keys_of(SEED, POSITION), (3, 11)))
    assert noise.shape == (5, 3, 11) and noise.dtype == np.float32
    assert len(np.unique(noise)) == noise.size


def test_gumbel_follows_its_distribution_over_seeds_over_positions_and_over_tokens():
    count = 30_011
    index = np.arange(count)
    zeros = np.zeros(count)
    draws = {
        "seeds": noise_of(index.astype(np.uint32), zeros.astype(np.int32))[:, 0],
        "positions": noise_of(zeros.astype(np.uint32), index.astype(np.int32))[:, 3],
        "tokens": gumbel(keys_of(SEED[:1], POSITION[:1]), (count,))[0],
    }
    for name, noise in draws.items():
        # Kolmogorov-Smirnov; the seeds are fixed, so this passes always or never.
        assert scipy.stats.kstest(np.asarray(noise), scipy.stats.gumbel_r.cdf).pvalue > 1e-3, name


def test_gumbel_is_finite_and_has_its_full_upper_tail(monkeypatch):
    words = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.asarray(words))
    noise = np.asarray(gumbel(keys_of(SEED, POSITION), (4,)))
    expected = -np.log(-np.log1p(-np.array([0.5, 1.5, 2**31 + 0.5]) / 2**32))
    np.testing.assert_allclose(noise[0, :3], expected, rtol=2**-21)
    # The largest word would round to u = 1; it takes the float below, 1 - 2**-24.
    np.testing.assert_allclose(noise[0, 3], -np.log(24 * np.log(2)), rtol=2**-21)
