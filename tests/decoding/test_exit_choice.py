"""The chosen exit layer and draft length are those of an enumeration in NumPy."""

import numpy as np
import pytest

from decodax.decoding.exit_choice import best_exit, tokens_per_layer


def expected(agreement, num_layers, layer, length):
    """Expected tokens of a round, enumerated over the number of right draft tokens, per layer that it runs."""
    chances = [agreement**right * (1 - agreement) for right in range(length)] + [agreement**length]
    tokens = sum((right + 1) * chance for right, chance in enumerate(chances))
    shallow = layer * (1 + length)  # the last token and every draft token
    return tokens / (shallow + num_layers - layer)


@pytest.mark.parametrize("seed", range(5))
def test_against_enumeration(seed):
    draw = np.random.default_rng(seed)
    agreement, num_layers = draw.uniform(0, 1, 6), 7
    agreement[draw.integers(6)] = draw.integers(2)  # always or never right
    worth = np.array([[expected(a, num_layers, i + 1, n) for n in range(10)] for i, a in enumerate(agreement)])
    np.testing.assert_allclose(tokens_per_layer(agreement, num_layers, 9), worth, rtol=1e-5)  # float32 sums of 10
    for shortest in (0, 1, 3):
        layer, tokens = map(int, best_exit(agreement, num_layers, 9, shortest))
        assert worth[layer - 1, tokens] == pytest.approx(worth[:, shortest:].max(), rel=1e-5)
        assert 1 <= layer <= 6 and shortest <= tokens <= 9


@pytest.mark.parametrize(
    ("agreement", "wanted"),
    [([0.0, 0.0, 0.0], (1, 0)), ([1.0, 1.0, 1.0], (1, 9)), ([0.2, 0.1, 0.0], (1, 0)), ([0.0, 1.0, 1.0], (2, 9))],
)
def test_extreme_agreements(agreement, wanted):
    """No draft where none pays; the first of equal exits; the longest draft of one that is never wrong."""
    assert tuple(map(int, best_exit(np.array(agreement), 4, 9))) == wanted
