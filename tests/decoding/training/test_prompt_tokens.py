"""Training of prompt tokens on a tiny target: the loss against plain forwards, and weights that load and draft."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax import decoding
from decodax.decoding.auxiliary_weights import find_auxiliary_weights, read_auxiliary_weights
from decodax.decoding.drafters import PromptTokens
from decodax.decoding.prompt_tree import static_tree
from decodax.decoding.training.prompt_tokens import RANKS, PromptTokensShape, PromptTokensTraining, _logits
from decodax.decoding.verifiers import ExactMatch
from tests.decoding.training import small
from tests.decoding.training.small import TEXTS, documents

SHAPE = PromptTokensShape(distances=2, ensemble=3)
PLAN = replace(small.PLAN, peak=0.1, window_tokens=16, short_tokens=16, weight_decay=0.0)
LONGEST = 138


@pytest.fixture(scope="module")
def finished(target, tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("ppd"), jax.tree.map(np.array, target.params)
    training = PromptTokensTraining(target, SHAPE, PLAN, TEXTS, folder / "run")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trained = training.train(report_every=10, measure_every=10)
    facts = training.export(folder / "out", trained.params, trained.step, folder / "out" / "loss.png", dtype="float32")
    return training, trained, folder / "out", facts, before


def logits_after(target, vectors):
    """Forward over vectors, without a cache: logits after the last; padded, so that one shape is compiled."""
    filled = np.zeros((1, LONGEST, vectors.shape[1]), np.float32)
    filled[0, : len(vectors)] = vectors
    return np.asarray(forward(target.model, target.params, jnp.asarray(filled)))[0, len(vectors) - 1]


@partial(jax.jit, static_argnums=0)
def forward(model, params, vectors):
    return model.logits(params, model.apply(params, vectors, jnp.arange(LONGEST, dtype=jnp.int32)[None]).hidden)


def probs(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def test_the_loss_is_that_of_separate_forwards(target):
    embedding = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, target.config.hidden_size)), np.float32)
    tokens = np.tile(np.stack([documents(3, 1)[0][:9], documents(4, 1)[0][:9]]), (1, 15))  # more than 127
    cut = np.array([[0, 4, 134], [2, 2, 133]], np.int32)
    logits = jax.jit(_logits, static_argnums=0)
    got = logits(target.model, target.params, jnp.asarray(embedding), jnp.asarray(tokens), jnp.asarray(cut))
    every = jnp.arange(37, dtype=jnp.int32)[None]
    table = np.asarray(target.model.embed(target.params, every, every * 0))[0]
    for row, text in enumerate(tokens):
        for index, end in enumerate(cut[row]):
            seen = table[text[: end + 1]]
            written = [*seen]
            for distance in range(2):
                written.append(table[np.argmax(logits_after(target, np.stack(written)))])
                np.testing.assert_allclose(
                    got[0][row, index, distance], logits_after(target, np.stack(written)), atol=1e-4
                )
                found = [
                    logits_after(target, np.concatenate([seen, embedding[: distance + 1, member]]))
                    for member in range(3)
                ]
                np.testing.assert_allclose(got[1][row, index, distance], np.mean(found, axis=0), atol=1e-4)
    tokens = tokens[:, :9]
    training = PromptTokensTraining(target, SHAPE, PLAN, TEXTS, Path("unused"))
    measured = training.measure({"embedding": jnp.asarray(embedding)}, np.pad(tokens, ((0, 0), (0, 1))))
    places = np.broadcast_to(np.array([4], np.int32), (2, 1))
    model_logits, found = logits(
        target.model, target.params, jnp.asarray(embedding), jnp.asarray(tokens), jnp.asarray(places)
    )
    divergence = [
        np.sum(probs(one) * np.log(probs(one) / probs(other)))
        for one, other in zip(np.asarray(model_logits).reshape(-1, 37), np.asarray(found).reshape(-1, 37), strict=True)
    ]
    assert measured["heldout_loss"] == pytest.approx(np.mean(divergence), rel=1e-4)
    order = np.argsort(-np.asarray(found[:, 0, 1]), axis=1)[:, :RANKS]
    is_right = order == np.argmax(np.asarray(model_logits[:, 0, 1]), axis=1)[:, None]
    np.testing.assert_allclose(measured["rank_accuracy"][1], is_right.mean(axis=0), atol=1e-6)


@pytest.mark.slow
def test_prompt_tokens_learn_and_the_target_stays_as_it_was(target, finished):
    training, _, _, _, before = finished
    jax.tree.map(np.testing.assert_array_equal, target.params, before)
    entries = [json.loads(line) for line in (training.run / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["loss"] < 0.95 * entries[0]["loss"]
    untrained = training.measure(training.initial(), training.texts.heldout_windows(PLAN.window_tokens))
    assert entries[-1]["heldout_loss"] < untrained["heldout_loss"]


@pytest.mark.slow
def test_the_weights_are_loaded_and_draft(target, finished):
    _, trained, out, facts, _ = finished
    weights = find_auxiliary_weights("ppd", target, out)
    np.testing.assert_array_equal(weights.params["embedding"], trained.params["embedding"])
    assert weights.rank_accuracy == facts["heldout"]["rank_accuracy"] and len(weights.rank_accuracy) == 2
    assert weights.shape == {"distances": 2, "ensemble": 3}
    drafter = PromptTokens(target.model, (static_tree(weights.rank_accuracy, 3),), ensemble=3)
    decode = jax.jit(decoding.speculative(target.model, drafter, ExactMatch()))
    plain = jax.jit(decoding.autoregressive(target.model))
    prompts = [np.stack([ids[:7] for ids in TEXTS.heldout]), np.full(3, 7), 20, np.zeros(3, np.uint32)]
    got = decode(target.params, weights.params, decoding.prefill(target.model, target.params, *prompts))
    want = plain(target.params, decoding.prefill(target.model, target.params, *prompts))
    np.testing.assert_array_equal(got.tokens, want.tokens)


def test_weights_of_other_models_and_kinds_are_refused(target, finished, tmp_path):
    out = finished[2]
    facts = json.loads((out / "auxiliary.json").read_text())
    for change, message in (
        ({"kind": "medusa"}, "needs weights of that kind, .* holds 'medusa'"),
        ({"target_hidden_size": 24}, "hidden size is 24, and that of tiny is 22: train weights .* `decodax train ppd`"),
        ({"target_layers": 3}, "number of layers is 3, and that of tiny is 1"),
    ):
        (tmp_path / "auxiliary.json").write_text(json.dumps(facts | change))
        (tmp_path / "auxiliary.safetensors").write_bytes((out / "auxiliary.safetensors").read_bytes())
        with pytest.raises(ValueError, match=message):
            find_auxiliary_weights("ppd", target, tmp_path)
    with pytest.raises(ValueError, match=r"needs auxiliary weights trained for tiny: .* \(`decodax train ppd`"):
        find_auxiliary_weights("ppd", target, None)
    (tmp_path / "auxiliary.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"auxiliary.safetensors is no intact safetensors file"):
        read_auxiliary_weights(tmp_path, jnp.float32)
    with pytest.raises(FileNotFoundError, match=r"holds no auxiliary\.json"):
        read_auxiliary_weights(tmp_path / "none", jnp.float32)
    with pytest.raises(ValueError, match="at least 1, got 0 and 1"):
        PromptTokensShape(0)
