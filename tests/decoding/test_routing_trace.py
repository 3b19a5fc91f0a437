"""Routing traces record the experts that the model chooses, in pieces or at once; files, counts, the picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding import routing_trace
from decodax.decoding.routing_trace import RoutingTrace, draw_routes, record_routes
from decodax.models.load import load
from tests.golden_files import load_golden

TEXTS = [np.random.default_rng(0).integers(0, 53, size) for size in (37, 15)]
PROMPTS = [30, 15]


@pytest.fixture(scope="module")
def lm():
    return load(load_golden("qwen2_moe_mixed").folder, dtype="float32")  # layers 0 and 2 are dense, and 3 by exception


@pytest.fixture(scope="module")
def trace(lm):
    return record_routes(lm, TEXTS, PROMPTS)


@pytest.mark.slow
def test_records_the_experts_that_the_model_chooses(lm, trace):
    assert trace.expert.shape == (1, 52, 3) and trace.expert.dtype == np.int16
    np.testing.assert_array_equal(trace.layer, [1])
    np.testing.assert_array_equal(trace.num_experts, [7])
    np.testing.assert_array_equal(trace.token, np.concatenate(TEXTS))
    np.testing.assert_array_equal(trace.row, [0] * 37 + [1] * 15)
    np.testing.assert_array_equal(trace.position, [*range(37), *range(15)])
    assert trace.is_output.sum() == 7 and trace.is_output[30:37].all()
    first = 0
    for text in TEXTS:
        tokens = jnp.asarray(text, jnp.int32)[None]
        position = jnp.arange(len(text), dtype=jnp.int32)[None]
        routes = jax.jit(lambda *operands: lm.model.apply(*operands).routes)(lm.params, tokens, position)
        assert [chosen is not None for chosen in routes] == [False, True, False, False]
        own = slice(first, first := first + len(text))
        np.testing.assert_array_equal(trace.expert[0, own], routes[1].expert[0])
        np.testing.assert_allclose(trace.gate[0, own], routes[1].gate[0], atol=1e-5)  # float32, sums of 30 terms


def test_a_trace_in_pieces_is_the_trace_at_once(lm, trace, monkeypatch):
    monkeypatch.setattr(routing_trace, "CHUNK_TOKENS", 16)
    seen = []
    pieces = record_routes(lm, TEXTS, PROMPTS, lambda done, total: seen.append((done, total)))
    np.testing.assert_array_equal(pieces.expert, trace.expert)
    np.testing.assert_allclose(pieces.gate, trace.gate, atol=1e-5)
    assert seen == [(16, 52), (32, 52), (37, 52), (52, 52)]


def hand_made():
    """Two layers; the first has three experts and one choice, the second two experts and two choices."""
    expert = np.array([[[0, -1], [2, -1], [2, -1]], [[0, 1], [1, 0], [0, 1]]], np.int16)
    numbers = np.arange(3, dtype=np.int32)
    shares = np.ones(expert.shape, np.float32)
    sizes = np.array([3, 2], np.int32)
    return RoutingTrace(numbers, numbers, numbers * 0, numbers > 1, expert, shares, np.array([1, 3], np.int32), sizes)


def test_counts_and_imbalance():
    trace = hand_made()
    np.testing.assert_array_equal(trace.counts(), [[1, 0, 2], [3, 3, 0]])
    np.testing.assert_allclose(trace.imbalance(), [2.0, 1.0])


def test_files(tmp_path, trace):
    file = tmp_path / "new" / "trace.npz"
    trace.save(file)
    back = RoutingTrace.load(file)
    for name in ("token", "position", "row", "is_output", "expert", "gate", "layer", "num_experts"):
        np.testing.assert_array_equal(getattr(back, name), getattr(trace, name))
    assert [path.name for path in file.parent.iterdir()] == ["trace.npz"]  # nothing half-written beside it
    np.savez(tmp_path / "other.npz", token=trace.token)
    with pytest.raises(ValueError, match=r"other.npz is no routing trace: it lacks expert, format"):
        RoutingTrace.load(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("not this")
    with pytest.raises(ValueError, match=r"text.npz"):
        RoutingTrace.load(tmp_path / "text.npz")


def test_the_picture_is_written(tmp_path):
    image = tmp_path / "picture.png"
    draw_routes(hand_made(), image, title="by hand")
    assert image.read_bytes().startswith(b"\x89PNG")


def test_a_model_without_experts_is_refused():
    dense = load(load_golden("qwen3").folder, dtype="float32")
    with pytest.raises(ValueError, match="has no layers with experts"):
        record_routes(dense, TEXTS, PROMPTS)
