"""Scores over a mesh are those of one device: padded vocabularies, split rows, tokens and layers."""

import numpy as np
import pytest

from decodax.decoding import token_scores as chunks
from decodax.decoding.continuations import Continuation
from decodax.decoding.sizes import chunk_tokens
from tests.models import test_pipelined as stages
from tests.sharding import wide

BLOCK_TOKENS = chunks.block_tokens  # as it is without the fixture
# Sums are taken in another order than on one device, and logits are of size 10.
TOLERANCE = 1e-4
CASES = [
    ("odd", "tensor=8"),  # 131 tokens on eight devices: the padding of the vocabulary is no token
    pytest.param("moe", "data=2,expert=2,tensor=2", marks=pytest.mark.slow),
    pytest.param("dense", "context=8", marks=pytest.mark.slow),
    ("mla", "data=2,context=2,tensor=2"),
]
SIZES = ((171, 60), (131, 130), (3, 1))


@pytest.fixture(autouse=True)
def several_chunks_and_blocks(monkeypatch):
    """Chunks of 96 tokens whatever the devices, then of 80, whose logits are made for 32 or 16 positions at a time."""
    for_all = lambda num_tokens, most, execution: chunk_tokens(num_tokens, 96 // execution.num_shards("T"), execution)
    monkeypatch.setattr(chunks, "chunk_tokens", for_all)
    monkeypatch.setattr(chunks, "block_tokens", lambda model, batch, chunk: 32 if chunk % 32 == 0 else 16)


def rows_of(model):
    random = np.random.default_rng(5)
    tokens = (random.integers(0, model.vocab_size, size) for size, _ in SIZES)
    return [Continuation(row, first) for row, (_, first) in zip(tokens, SIZES, strict=True)]


def scores(model, params):
    return chunks.token_scores(model, params, rows_of(model), 4)


def check(split, single):
    for one, other, (size, first) in zip(split, single, SIZES, strict=True):
        assert one.logprob.shape == (size - first,)
        np.testing.assert_allclose(one.logprob, other.logprob, atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(one.is_argmax, other.is_argmax)


@pytest.mark.parametrize(("kind", "mesh"), CASES)
def test_scores(kind, mesh):
    split, single = ((wide.model_of(kind, over), wide.params_of(kind, over)) for over in (mesh, None))
    check(scores(*split), scores(*single))


def test_scores_in_pipeline_stages():
    single = stages.model_of("dense", 2), stages.params_of("dense", 2)
    check(scores(*stages.in_stages("dense", stages.TWO, 1)), scores(*single))


def test_blocks_have_as_many_tokens_on_each_device():
    model = wide.model_of("dense", "data=2,context=2,tensor=2")
    of_device = 4 * 2 * wide.VOCABULARY // 2  # bytes of a position's logits: four rows on two devices, V on two
    for positions, expected in ((1, 2), (5, 8), (47, 48), (48, 96), (1000, 96)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("decodax.decoding.token_scores.LOGITS_BYTES", of_device * positions)
            assert BLOCK_TOKENS(model, 4, 96) == expected
