"""Training of exit predictors on a tiny model: they learn, are measured right, and are used by name."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax.decoding.auxiliary_weights import find_auxiliary_weights
from decodax.decoding.training import exit_predictors
from decodax.decoding.training.exit_predictors import ExitPredictorShape, ExitPredictorTraining
from decodax.decoding.training.export import write_model
from decodax.decoding.training.texts import Texts
from decodax.models.configs.hf_config import read_config
from decodax.models.model import Model
from tests.decoding.training import small
from tests.tiny import TINY_LLAMA

CONFIG = TINY_LLAMA | {"num_hidden_layers": 3, "eos_token_id": 36}
SHAPE = ExitPredictorShape(hidden_size=11, likely_tokens=5, positions=7)
PLAN = replace(small.PLAN, steps=60, decay_from=40, long_from=60, windows_per_step=4)


def documents(seed, count):
    draw = np.random.default_rng(seed)
    return [draw.integers(1, 36, size=50).astype(np.int32) for _ in range(count)]


TEXTS = Texts(documents(0, 20), documents(1, 3), separator=(0,))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of three layers, and a draft that often agrees: the same weights, disturbed."""
    params = jax.tree.map(lambda leaf: 1.5 * leaf, Model(read_config(CONFIG)[1]).init(jax.random.key(0)))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    found = []
    for name, weights in (("model", params), ("draft", jax.tree.unflatten(structure, noisy))):
        folder = tmp_path_factory.mktemp(name)
        write_model(folder, CONFIG, weights, "float32")
        found.append(decodax.load(folder, dtype="float32"))
    return found


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    folder, (target, draft) = tmp_path_factory.mktemp("exits"), models
    training = ExitPredictorTraining(target, SHAPE, PLAN, TEXTS, folder / "run", draft)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trained = training.train(report_every=20, measure_every=20)
    facts = training.export(folder / "out", trained.params, trained.step, folder / "out" / "loss.png", dtype="float32")
    return training, trained.params, folder / "out", facts


def examples_of_numpy(training, tokens, place):
    """Features and labels [L - 1, B, P] from full logits of every layer, place by place."""
    target, draft = training.target, training.draft
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    out = target.model.apply(target.params, tokens, position, capture=(1, 2, 3))
    logits = np.stack([np.asarray(target.model.logits(target.params, out.captured[layer])) for layer in (1, 2, 3)])
    drafted = draft.model.logits(draft.params, draft.model.apply(draft.params, tokens, position).hidden)
    features, is_likely = np.zeros((2, *place.shape, 15)), np.zeros((2, *place.shape), bool)
    is_final = np.zeros_like(is_likely)
    for b, column in np.ndindex(place.shape):
        at = place[b, column]
        likely, previous = np.argsort(-np.asarray(drafted)[b, at], kind="stable")[:5], None
        for layer in range(2):
            own = logits[layer, b, at, likely].astype(np.float64)
            probs = np.exp(own) / np.exp(own).sum()
            change = np.zeros(5) if previous is None else probs - previous
            features[layer, b, column], previous = np.concatenate([own, probs, change]), probs
            is_likely[layer, b, column] = logits[layer, b, at].argmax() in likely
            is_final[layer, b, column] = logits[layer, b, at].argmax() == logits[2, b, at].argmax()
    return features, is_likely, is_final


def scores_of_numpy(params, features):
    weights = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    hidden = np.einsum("lbpf,lfw->lbpw", features, weights["hidden"]) + weights["hidden_bias"][:, None, None]
    return np.einsum("lbpw,lw->lbp", np.maximum(hidden, 0), weights["out"]) + weights["out_bias"][:, None, None]


def places_of(key, batch_size, num_tokens):
    return np.asarray(exit_predictors.places(batch_size, num_tokens, SHAPE.positions, key))


def test_the_loss_is_the_cross_entropy_of_a_recomputation(finished):
    training, params, _, _ = finished
    rows, step = jnp.asarray(TEXTS.heldout_windows(14)[:3]), jnp.int32(5)
    place = places_of(jax.random.fold_in(jax.random.key(PLAN.seed), step), 3, 14)
    features, is_likely, is_final = examples_of_numpy(training, rows[:, :-1], place)
    label, score = is_likely & is_final, scores_of_numpy(params, features)
    assert 0.05 < label.mean() < 0.95
    chance = 1 / (1 + np.exp(-score))
    wanted = -np.mean(np.where(label, np.log(chance), np.log(1 - chance)))
    found = jax.jit(training.loss)(params, training.frozen(), rows, step)
    assert float(found) == pytest.approx(wanted, abs=1e-4)  # logits of size 10 in float32, through two small layers


@pytest.mark.slow
def test_the_predictors_learn_and_the_models_stay_as_they_were(finished, models):
    training, _, _, facts = finished
    entries = [json.loads(line) for line in (training.run / "log.jsonl").read_text().splitlines()]
    first, *_, last = [entry for entry in entries if "heldout_loss" in entry]
    assert last["heldout_loss"] < first["heldout_loss"] and last["accuracy"] > first["accuracy"] - 0.05
    for lm in models:
        jax.tree.map(np.testing.assert_array_equal, lm.params, decodax.load(lm.path, dtype="float32").params)
    # Better than the best constant after each layer, which knows how often exits are right but not when.
    windows, pieces = TEXTS.heldout_windows(14), []
    for begin in range(0, len(windows), 4):
        place = places_of(jax.random.key(np.uint32(begin)), 4, 14)[: len(windows[begin : begin + 4])]
        pieces.append(examples_of_numpy(training, jnp.asarray(windows[begin : begin + 4, :-1]), place))
    features, is_likely, is_final = (np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    label = is_likely & is_final
    share = label.mean(axis=(1, 2))
    constant = -np.mean(share * np.log(share) + (1 - share) * np.log(1 - share))
    assert facts["heldout"]["heldout_loss"] < constant
    # And the facts are what they do there.
    chance = 1 / (1 + np.exp(-scores_of_numpy(finished[1], features)))
    assert facts["heldout"]["accuracy"] == pytest.approx(((chance > 0.5) == label).mean(), abs=1e-9)
    for threshold, (mean_layers, agreement) in facts["heldout"]["exit_curve"].items():
        exits = (chance > float(threshold)) & is_likely
        layers = np.where(exits[0], 1, np.where(exits[1], 2, 3))
        right = np.where(exits[0], is_final[0], np.where(exits[1], is_final[1], True))
        assert (mean_layers, agreement) == (pytest.approx(layers.mean()), pytest.approx(right.mean()))
    assert facts["heldout"]["exit_curve"]["0.5"] == [facts["heldout"]["mean_layers"], facts["heldout"]["agreement"]]


def test_one_place_of_each_piece_is_chosen():
    place = places_of(jax.random.key(0), 50, 23)
    border = np.arange(8) * 23 // 7
    assert np.all((place >= border[:-1]) & (place < border[1:]))
    assert all(set(place[:, i]) == set(range(border[i], border[i + 1])) for i in range(7))
    np.testing.assert_array_equal(places_of(jax.random.key(1), 2, 3), [[0, 1, 2]] * 2)


@pytest.mark.slow
def test_the_folder_is_used_by_name(finished, models):
    _, params, out, facts = finished
    expected = ["auxiliary.json", "auxiliary.safetensors", "draft", "loss.png"]
    assert sorted(file.name for file in out.iterdir()) == expected
    weights = find_auxiliary_weights("specee", models[0], out)
    jax.tree.map(np.testing.assert_array_equal, weights.params, params)
    assert facts["about"]["draft"] != facts["about"]["target"] and facts["target_layers"] == 3
    prompts, options = [[5, 7, 11], [2, 3]], {"max_new_tokens": 8, "draft": out}
    plain = decodax.generate(models[0], prompts, max_new_tokens=8)
    for name, extra in (("specee", {}), ("specee_tree", {"draft_tokens": 5})):
        found = decodax.generate(models[0], prompts, strategy=name, **options, **extra)
        assert found.stats.strategy == name and [len(row) for row in found.tokens] == [8, 8]
        assert found.stats.target_forwards <= plain.stats.target_forwards
    for name, draft_tokens, message in (
        ("specee", 4, "strategy 'specee' has no option draft_tokens: its options are threshold"),
        ("specee_tree", "auto", "draft_tokens must be a whole number, got 'auto'"),
    ):
        with pytest.raises(ValueError, match=message):
            decodax.generate(models[0], prompts, strategy=name, draft_tokens=draft_tokens, **options)
    with pytest.raises(ValueError, match=r"needs the draft that .* was trained with"):
        decodax.generate(models[0], prompts, strategy="specee", draft=weights)


def test_bad_inputs_are_refused(finished, target):
    training = finished[0]
    with pytest.raises(ValueError, match="hidden_size must be at least 1, got 0"):
        ExitPredictorShape(hidden_size=0)
    with pytest.raises(ValueError, match=r"likely_tokens must be in 1..37 \(the vocabulary\), got 38"):
        replace(training, shape=replace(SHAPE, likely_tokens=38))
    with pytest.raises(ValueError, match="a model of at least 2 layers, got 1"):
        replace(training, target=target).initial()
    config = read_config(CONFIG | {"vocab_size": 41})[1]
    with pytest.raises(ValueError, match="the model's vocabulary of 37 tokens, got 41"):
        replace(training, draft=replace(target, config=config, path=Path("other")))
