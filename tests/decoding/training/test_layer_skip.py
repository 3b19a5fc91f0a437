"""LayerSkip training of a tiny model of two layers: the loss in NumPy, what is learnt, the merged adapter."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from typer.testing import CliRunner

import decodax
from decodax.cli.app import app
from decodax.decoding.auxiliary_weights import AuxiliaryWeights, read_auxiliary_weights, write_auxiliary_weights
from decodax.decoding.training.export import write_model
from decodax.decoding.training.layer_skip import LayerSkipShape, LayerSkipTraining, exits_of_step
from decodax.decoding.training.texts import Texts
from decodax.models.configs.hf_config import read_config
from decodax.models.model import Model
from tests.decoding.training import small
from tests.tiny import TINY_LLAMA

CONFIG = TINY_LLAMA | {"num_hidden_layers": 2, "max_position_embeddings": 64, "eos_token_id": 5}
CHARACTERS = "abcdefghijklmnopqrstuvwxyz ():\n"
SHAPE = LayerSkipShape(rank=3, exits_per_step=1)
PLAN = replace(small.PLAN, weight_decay=0.0, seed=0)
DRAW = np.random.default_rng(0)
TEXTS = Texts([DRAW.integers(1, 37, 200).astype(np.int32)], [DRAW.integers(1, 37, 90).astype(np.int32)])
ROWS = DRAW.integers(0, 37, (5, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder of single characters, with weights large enough that distributions are far from uniform."""
    folder = tmp_path_factory.mktemp("model")
    params = jax.tree.map(lambda leaf: 1.5 * leaf, Model(read_config(CONFIG)[1]).init(jax.random.key(0)))
    write_model(folder, CONFIG, params, "float32")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return decodax.load(folder)


@pytest.fixture(scope="module")
def finished(lm, tmp_path_factory):
    """The training, its result, the exported folder, the facts returned, the weights before."""
    folder, before = tmp_path_factory.mktemp("change"), jax.tree.map(np.array, lm.params)
    training = LayerSkipTraining(lm, SHAPE, PLAN, TEXTS, folder / "run")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trained = training.train(report_every=10, measure_every=10)
    facts = training.export(folder / "out", trained.params, trained.step, folder / "out" / "loss.png")
    return training, trained, folder / "out", facts, before


def exit_distributions(lm, params, rows):
    """Log-probabilities after the first layer and after both, in float64: [2, B, T, V]."""
    position = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=jnp.int32), rows.shape)
    captured = lm.model.apply(params, jnp.asarray(rows), position, capture=(1, 2)).captured
    logits = np.stack([np.asarray(lm.model.logits(params, captured[layer]), np.float64) for layer in (1, 2)])
    logits -= logits.max(axis=3, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=3, keepdims=True))


def divergence(target, logprobs):
    return (np.exp(target) * (target - logprobs)).sum(axis=2).mean()


def random_change(training):
    change = training.initial()
    leaves, structure = jax.tree.flatten(change)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def with_change(params, change):
    """The weights with the change added, in NumPy."""
    if "up" in change and not isinstance(change["up"], dict):
        return np.asarray(params) + np.asarray(change["up"]) @ np.asarray(change["down"])
    return {**params, **{name: with_change(params[name], own) for name, own in change.items()}}


def test_the_loss(lm, tmp_path):
    """Weighted by depth over the first exit (of 2 layers) and the last; at step 0 the last one's share is 0."""
    training = LayerSkipTraining(
        lm, replace(SHAPE, max_dropout=0.0, exit_scale=0.7, exit_power=2.0), PLAN, TEXTS, tmp_path
    )
    weight = 0.7 * (1 / 2) ** 2
    tokens = ROWS[:, :-1]
    wanted = exit_distributions(lm, lm.params, tokens)
    zero = divergence(wanted[1], wanted[0]) * weight / (1 + weight)
    loss = jax.jit(training.loss)
    rows = jnp.asarray(ROWS)
    assert float(loss(training.initial(), lm.params, rows, jnp.int32(0))) == pytest.approx(zero, rel=1e-5)
    change = random_change(training)
    first, last = exit_distributions(lm, jax.tree.map(jnp.asarray, with_change(lm.params, change["low_rank"])), tokens)
    early, late = divergence(wanted[1], first), divergence(wanted[1], last)
    assert late > 0.1
    got = float(loss(change, lm.params, rows, jnp.int32(0)))
    assert got == pytest.approx((weight * early + late) / (1 + weight), rel=1e-5)


def test_layers_are_dropped_row_by_row_and_step_by_step(lm, tmp_path):
    """A row that drops the second layer has the logits of the first at its end; with probability 1 all rows do."""
    rows = jnp.asarray(ROWS)
    early, _ = wanted = exit_distributions(lm, lm.params, ROWS[:, :-1])
    of_rows = np.array([divergence(wanted[1][row : row + 1], early[row : row + 1]) for row in range(5)])
    for chance in (1.0, 0.5):
        training = LayerSkipTraining(lm, replace(SHAPE, max_dropout=chance), PLAN, TEXTS, tmp_path)
        initial, loss = training.initial(), jax.jit(training.loss)
        losses = [float(loss(initial, lm.params, rows, jnp.int32(step))) for step in range(6)]
        late = np.array(losses) * 2 - of_rows.mean()  # the first exit weighs as much as the last
        if chance == 1.0:
            np.testing.assert_allclose(late, of_rows.mean(), rtol=1e-4)
        else:
            subsets = np.array([[number >> row & 1 for row in range(5)] for number in range(32)]) @ of_rows / 5
            assert np.abs(late[:, None] - subsets[None]).min(axis=1).max() < 1e-4
            assert len(set(late.round(4))) > 2  # another draw in every step


@pytest.mark.slow
def test_it_learns_and_the_model_stays_as_it_was(lm, finished):
    training, trained, _, facts, before = finished
    jax.tree.map(np.testing.assert_array_equal, lm.params, before)
    entries = [json.loads(line) for line in (training.run / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["loss"] < 0.9 * entries[0]["loss"]
    windows = TEXTS.heldout_windows(14)
    start = training.measure(training.initial(), windows)
    assert (start["heldout_loss"], start["greedy"]) == (0.0, 1.0)
    end = training.measure(trained.params, windows)
    assert end["heldout_loss"] > 0 and end["exit_agreement"][0] > start["exit_agreement"][0]
    assert facts["best"]["exit_layer"] == 1 and facts["heldout"]["tokens"] == len(windows) * 14


@pytest.mark.slow
def test_the_measured_facts(lm, finished):
    training, trained, *_ = finished
    windows = TEXTS.heldout_windows(14)
    changed = jax.tree.map(jnp.asarray, with_change(lm.params, trained.params["low_rank"]))
    wanted, found = (exit_distributions(lm, params, windows[:, :-1]) for params in (lm.params, changed))
    got = training.measure(trained.params, windows)
    assert got["heldout_loss"] == pytest.approx(divergence(wanted[1], found[1]), rel=1e-3)
    best = found.argmax(axis=3)
    assert got["greedy"] == pytest.approx((best[1] == wanted[1].argmax(axis=2)).mean())
    assert got["exit_agreement"] == [pytest.approx((best[0] == best[1]).mean())] and got["tokens"] == best[0].size


def test_every_exit_is_trained_in_turn():
    for num_exits, per_step in ((7, 1), (7, 2), (5, 5), (4, 3)):
        seen = np.concatenate([exits_of_step(jnp.int32(step), num_exits, per_step) for step in range(num_exits)])
        np.testing.assert_array_equal(np.bincount(seen)[1:], per_step)
        assert seen.min() == 1 and len(set(seen[:per_step].tolist())) == per_step


@pytest.mark.slow
def test_an_adapter_is_merged_when_a_model_is_loaded(folder, lm, finished):
    *_, out, _, _ = finished
    weights = read_auxiliary_weights(out, np.float32)
    changed = decodax.load(folder, adapter=out)
    wanted = with_change(lm.params, weights.params["low_rank"])
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6), changed.params, wanted)
    assert changed.adapter.facts["heldout"] == weights.facts["heldout"] and lm.adapter is None
    write_auxiliary_weights(folder / "mine", AuxiliaryWeights(weights.kind, weights.params, weights.facts), "float32")
    named = decodax.load(folder, adapter="mine")
    jax.tree.map(np.testing.assert_array_equal, named.params, changed.params)
    plain = decodax.generate(changed, [[3, 1, 4], [1, 5]], max_new_tokens=20, stop_token_ids=())
    for strategy in ("layer_skip", "del"):
        got = decodax.generate(changed, [[3, 1, 4], [1, 5]], max_new_tokens=20, stop_token_ids=(), strategy=strategy)
        for mine, want in zip(got.tokens, plain.tokens, strict=True):
            np.testing.assert_array_equal(mine, want)


@pytest.mark.slow
def test_adapters_that_do_not_fit(folder, lm, finished, tmp_path):
    *_, out, _, _ = finished
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no auxiliary.json"):
        decodax.load(folder, adapter="nowhere")
    weights = read_auxiliary_weights(out, np.float32)
    write_auxiliary_weights(tmp_path / "heads", AuxiliaryWeights("medusa", weights.params, weights.facts), "float32")
    with pytest.raises(ValueError, match=r"heads holds 'medusa'"):
        decodax.load(folder, adapter=tmp_path / "heads")
    wide = AuxiliaryWeights(weights.kind, weights.params, weights.facts | {"target_hidden_size": 24})
    write_auxiliary_weights(tmp_path / "wide", wide, "float32")
    with pytest.raises(ValueError, match=r"hidden size is 24, and that of .* is 22"):
        decodax.load(folder, adapter=tmp_path / "wide")
    config = CONFIG | {"intermediate_size": 31}
    write_model(tmp_path / "other", config, Model(read_config(config)[1]).init(jax.random.key(0)), "float32")
    with pytest.raises(
        ValueError, match=r"feed_forward.down.down of out must have shape \[3, 31\], got shape \[3, 29\]"
    ):
        decodax.load(tmp_path / "other", adapter=out)


def test_early_exit_strategies_refuse_a_draft(lm):
    for strategy in ("layer_skip", "del"):
        with pytest.raises(ValueError, match=rf"{strategy} drafts with the model's own layers, got draft='x'"):
            decodax.generate(lm, [[1]], strategy=strategy, draft="x")
        with pytest.raises(ValueError, match="draft_tokens must be a whole number, got 'auto'"):
            decodax.generate(lm, [[1]], strategy=strategy, draft_tokens="auto")
        with pytest.raises(ValueError, match="at least 1"):
            decodax.generate(lm, [[1]], strategy=strategy, draft_tokens=0)


def test_bad_shapes(lm, target, tmp_path):
    for change, message in (
        ({"rank": 0}, "at least 1, got 0"),
        ({"max_dropout": 1.5}, r"max_dropout must be in 0..1"),
        ({"exit_scale": 0.0}, "exit_scale must be above 0"),
        ({"exit_share": 0.0}, "exit_share must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerSkipShape(**change)
    with pytest.raises(ValueError, match="exits_per_step must be at most 1"):
        LayerSkipTraining(lm, LayerSkipShape(), PLAN, TEXTS, tmp_path)
    with pytest.raises(ValueError, match="needs a model of at least 2 layers"):
        LayerSkipTraining(target, SHAPE, PLAN, TEXTS, tmp_path)


@pytest.mark.slow
def test_the_commands(folder, tmp_path):
    """`decodax train layer_skip`, then `decodax generate --adapter`."""
    text = tmp_path / "text.py"
    text.write_text("".join(f"def x{a}(b):\n  return b\n" for a in CHARACTERS[:24]))
    plan = "--batch=3 --window=14 --short-window=14 --tokens=84 --optimizer=adamw --heldout=0.2 --exits-per-step=1"
    arguments = ["--model", folder, "--text", text, "-o", tmp_path / "out", *plan.split()]
    result = CliRunner().invoke(app, ["train", "layer_skip", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "draft tokens after 1 layers" in result.stdout
    arguments = ["def x", "--model", folder, "--adapter", tmp_path / "out", "--strategy", "del", "--max-new-tokens", 9]
    result = CliRunner().invoke(app, ["generate", *map(str, arguments), "--json", "--no-compilation-cache"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["stats"]["strategy"] == "del"
