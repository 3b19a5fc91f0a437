"""The baselines of the embedded model are correct, so that the comparison is fair."""

import math
import random

import numpy as np
import pytest

from decodax.scripts import demo_baselines, demo_evaluation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def documents():
    draw = random.Random(1)
    return [[draw.choice([0, 1, 1, 2, 3, 3, 3, 5]) for _ in range(length)] for length in (31, 1, 17, 63)]


@pytest.mark.parametrize("orders", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_any_context(documents, orders):
    model = demo_baselines.KneserNey(documents, vocabulary=7, orders=orders)
    for context in [[], [0], [6], [1, 3], [5, 5, 5, 5, 5], [3, 3, 1], [-1, -1, -1, 2]]:
        probabilities = model.probabilities(context)
        assert probabilities.min() > 0  # unseen tokens too: the uniform distribution is the last back-off
        assert abs(probabilities.sum() - 1) < 1e-12  # seven additions of float64


def test_a_bigram_model_by_hand():
    """Text 0 1 0 1 2 over {0, 1, 2}, after a start sign.

    Bigrams: (s 0) 1, (0 1) 2, (1 0) 1, (1 2) 1: three counts of one and one of two give d = 3 / (3 + 2) = 0.6.
    Different left neighbours: 0 has {s, 1}, 1 has {0}, 2 has {1}: counts 2, 1, 1, so d = 2 / (2 + 2) = 0.5.
    """
    model = demo_baselines.KneserNey([[0, 1, 0, 1, 2]], vocabulary=3, orders=2)
    unigram = [(2 - 0.5 + 0.5 * 3 / 3) / 4, (1 - 0.5 + 0.5) / 4, (1 - 0.5 + 0.5) / 4]
    assert np.allclose(model.probabilities([]), unigram, atol=1e-12)
    after_one = [(1 - 0.6 + 0.6 * 2 * unigram[0]) / 2, 0.6 * 2 * unigram[1] / 2, (1 - 0.6 + 0.6 * 2 * unigram[2]) / 2]
    assert np.allclose(model.probabilities([1]), after_one, atol=1e-12)
    assert model.bits([0]) == pytest.approx(-math.log2(1 - 0.6 + 0.6 * unigram[0]))


def test_longer_contexts_help_on_regular_text():
    text = [0, 1, 2, 0, 3, 1] * 30
    bits = [demo_baselines.KneserNey([text], vocabulary=5, orders=orders).bits(text) for orders in (1, 2, 3)]
    assert bits[0] > 1.5 * bits[1] > 1.5 * bits[2]


def test_xz_finds_text_it_has_read_before():
    draw = random.Random(2)
    text = bytes(draw.randrange(256) for _ in range(5000))
    assert demo_baselines.xz_bytes(text) >= 5000  # noise
    assert demo_baselines.xz_bytes_after(text, before=b"other words " * 50 + text) < 100


def test_every_token_is_scored_once_with_half_a_context():
    lengths = (1, 5, 8, 9, 12, 13, 40)
    documents = [np.arange(1, length + 1) + 100 * i for i, length in enumerate(lengths, 1)]
    rows, counts = demo_evaluation.scored_rows(documents, context=8)
    scored = [int(token) for row, count in zip(rows, counts, strict=True) for token in row[1:][count == 1]]
    assert sorted(scored) == sorted(int(token) for document in documents for token in document)
    for row, count in zip(rows, counts, strict=True):
        assert row[0] == 0 or not count[:4].any()


def test_model_bits_against_a_sum_over_the_documents():
    """A model that reads only the last token: its bits are a sum over pairs, whatever the rows."""
    vocabulary = 11
    table = np.random.default_rng(3).normal(size=(vocabulary, vocabulary))
    documents = [np.random.default_rng(i).integers(1, vocabulary, length) for i, length in enumerate((3, 23, 16, 1))]
    log_probability = table - np.log(np.exp(table).sum(1, keepdims=True))
    expected = -sum(
        log_probability[previous, token] for ids in documents for previous, token in zip([0, *ids], ids, strict=False)
    ) / math.log(2)
    bits = demo_evaluation.model_bits(
        lambda params, tokens: params[tokens], np.float32(table), documents, context=8, batch=3
    )
    assert bits == pytest.approx(expected, rel=1e-5)  # float32 sums over 43 tokens: 43 x 6e-8, with room


def test_baselines_are_counted_over_the_same_bytes():
    from decodax.scripts.demo_corpus import Document

    train, heldout = ([Document(f"{name}.py", name, name * 100, False)] for name in ("abc", "abd"))
    bits = demo_evaluation.baseline_bits(
        train, heldout, lambda ds: [np.frombuffer(d.text.encode(), np.uint8) for d in ds], vocabulary=256, orders=3
    )
    assert bits["xz -9e"] == 8 * demo_baselines.xz_bytes(b"abd" * 100)
    assert bits["xz -9e after the training split"] < bits["xz -9e"] + 8
    model = demo_baselines.KneserNey([b"abc" * 100], 256, 3)
    assert bits["3-gram, interpolated Kneser-Ney"] == pytest.approx(model.bits(b"abd" * 100))
