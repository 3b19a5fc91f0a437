"""Training of a Kangaroo adapter: the loss against NumPy, what it learns, and the strategy that decodes with it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from typer.testing import CliRunner

import decodax
from decodax.cli.app import app
from decodax.decoding.auxiliary_weights import read_auxiliary_weights
from decodax.decoding.training.export import write_model
from decodax.decoding.training.kangaroo import KangarooShape, KangarooTraining, expected_tokens_per_full_forward
from decodax.models.configs.hf_config import read_config
from decodax.models.load import LanguageModel
from decodax.models.model import Model
from tests.decoding.training import small
from tests.decoding.training.small import TEXTS
from tests.oracles.attention import attention
from tests.speculation import MODEL, PARAMS, disturbed, forward
from tests.tiny import TINY_LLAMA

LM = LanguageModel(MODEL, MODEL.config, PARAMS, None, Path("tiny"), ())
PLAN = replace(small.PLAN, steps=30, decay_from=20, long_from=30, seed=0)
ROWS = np.random.default_rng(3).integers(0, 37, (5, 15)).astype(np.int32)
# float32 sums over 37 tokens, after products of at most 48 terms, on values of order one
RTOL = 1e-4


def training(run=Path("run")):
    return KangarooTraining(LM, KangarooShape(1), PLAN, TEXTS, run)


def probs(logits):
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def draft_oracle(adapter, hidden):
    """The draft's logits for one window in float64: the tiny model's second mixer between two norms, then the head."""
    weight = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), adapter)
    mixer, hidden = weight["mixer"], np.asarray(hidden, np.float64)

    def norm(inputs, scale):
        return inputs / np.sqrt(np.mean(inputs**2, axis=-1, keepdims=True) + 1e-5) * scale

    def project(name):
        return (normed @ mixer[name].T + mixer[f"{name}_bias"]).reshape(len(hidden), -1, 8)

    def rotated(heads):  # the first 4 of 8 coordinates, as pairs (0, 2) and (1, 3)
        angle = np.arange(len(hidden))[:, None, None] * np.array([1.0, 1e4**-0.5])
        first, second, rest = heads[..., :2], heads[..., 2:4], heads[..., 4:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)

    normed = norm(hidden, weight["mixer_norm"]["weight"])
    query = rotated(norm(project("query"), mixer["query_norm"]["weight"]))
    key, value = rotated(norm(project("key"), mixer["key_norm"]["weight"])), project("value")
    place = np.arange(len(hidden))
    mixed = [attention(query[at], key, value, place <= at, 0.4).reshape(-1) for at in place]
    after = hidden + np.stack(mixed) @ mixer["out"].T + mixer["out_bias"]
    head = np.asarray(PARAMS["head"], np.float64)
    return 5.0 * np.tanh(norm(after, weight["final_norm"]["weight"]) @ head.T / 5.0)


@pytest.fixture(scope="module")
def adapter():
    """Weights that are nowhere those of the target."""
    return disturbed(training().initial(), 0.1)


@pytest.fixture(scope="module")
def logits(adapter):
    """Of target and draft at every position of the windows, the draft's in float64."""
    out, target = forward(PARAMS, jnp.asarray(ROWS[:, :-1]))
    return np.asarray(target), np.stack([draft_oracle(adapter["adapter"], hidden) for hidden in out.captured[1]])


def kl_oracle(target, draft):
    p, q = probs(target), probs(draft)
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


def test_the_loss_is_the_divergence_from_the_target_at_all_positions(adapter, logits):
    loss = jax.jit(jax.value_and_grad(training().loss, argnums=(0, 1)))
    value, (of_adapter, of_target) = loss(adapter, PARAMS, ROWS, 0)
    assert float(value) == pytest.approx(kl_oracle(*logits).mean(), rel=RTOL)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_adapter))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_target))


def test_the_measured_facts_are_the_oracle_s(adapter, logits):
    p, q = map(probs, logits)
    order = np.argsort(-q, axis=-1, kind="stable")
    found = training().measure(adapter, ROWS)
    assert found["heldout_loss"] == pytest.approx(kl_oracle(*logits).mean(), rel=RTOL)
    assert found["sampling"] == pytest.approx(np.mean(np.minimum(p, q).sum(axis=-1)), rel=RTOL)
    ranks = [np.mean(order[..., rank] == p.argmax(axis=-1)) for rank in range(8)]
    assert found["rank_accuracy"] == [pytest.approx(ranks, abs=1e-6)]
    assert found["greedy"] == found["rank_accuracy"][0][0] and found["tokens"] == 5 * 14


def test_it_starts_as_the_attention_of_the_first_layer_left_out_and_the_last_norm():
    first = training().initial()["adapter"]
    wanted = {"mixer": PARAMS["blocks_1"]["mixer"], "mixer_norm": PARAMS["blocks_1"]["mixer_norm"]}
    jax.tree.map(np.testing.assert_array_equal, first, wanted | {"final_norm": PARAMS["final_norm"]})


def test_the_adapter_learns_and_the_target_stays_as_it_was(tmp_path):
    before = jax.tree.map(np.array, PARAMS)
    mine = training(tmp_path / "run")
    trained = mine.train(report_every=10, measure_every=10)
    jax.tree.map(np.testing.assert_array_equal, PARAMS, before)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first, last = mine.measure(mine.initial(), TEXTS.heldout_windows(14)), entries[-1]
    assert last["heldout_loss"] < 0.8 * first["heldout_loss"] and last["sampling"] > first["sampling"]
    facts = mine.export(tmp_path / "out", trained.params, trained.step, tmp_path / "out" / "loss.png")
    weights = read_auxiliary_weights(tmp_path / "out", "float32")
    assert (weights.kind, weights.shape, set(weights.params)) == ("kangaroo", {"exit_layer": 1}, {"adapter"})
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), trained.params)
    jax.tree.map(np.testing.assert_array_equal, weights.params, rounded)
    expected = [expected_tokens_per_full_forward(facts["heldout"]["greedy"], 1, 2, count) for count in range(1, 9)]
    assert weights.facts["greedy_tokens_per_full_forward"] == expected and weights.rank_accuracy[0][0] == pytest.approx(
        weights.facts["heldout"]["greedy"]
    )


def test_expected_tokens_per_full_forward_are_those_of_a_simulation():
    draw = np.random.default_rng(0)
    for chance, exit_layer, num_layers, count in ((0.6, 2, 8, 3), (0.3, 1, 5, 1), (0.9, 3, 32, 7)):
        tokens = 1 + np.cumprod(draw.random((100_000, count)) < chance, axis=1).sum(axis=1)
        layers = sum(exit_layer for _ in range(count + 1)) + (num_layers - exit_layer)
        found = expected_tokens_per_full_forward(chance, exit_layer, num_layers, count)
        # 5 standard errors of a mean of 100,000 values with a standard deviation of at most 4
        assert found == pytest.approx(tokens.mean() * num_layers / layers, abs=5 * 4 / 100_000**0.5)


def test_an_exit_beyond_the_model_is_refused():
    for exit_layer in (0, 2):
        with pytest.raises(ValueError, match=rf"exit_layer must be in 1\.\.1 .* got {exit_layer}"):
            replace(training(), shape=KangarooShape(exit_layer))


CHARACTERS = "abcdefghijklmnopqrstuvwxyz ():\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of three layers that reads and writes single characters, and a text."""
    config = TINY_LLAMA | {"num_hidden_layers": 3, "max_position_embeddings": 64, "eos_token_id": 36}
    path = tmp_path_factory.mktemp("kangaroo")
    params = jax.tree.map(lambda leaf: 1.5 * leaf, Model(read_config(config)[1]).init(jax.random.key(0)))
    write_model(path / "model", config, params, "float32")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.save(str(path / "model" / "tokenizer.json"))
    (path / "text.py").write_text("".join(f"def f{a}(b):\n  return b\n" for a in CHARACTERS[:24]))
    return path


def run(folder, *arguments):
    usual = ["--model", folder / "model", "--text", folder / "text.py", "--batch=3", "--window=14", "--short-window=14"]
    usual += ["--tokens=420", "--heldout=0.2", *arguments]
    return CliRunner().invoke(app, ["train", "kangaroo", *map(str, usual)])


@pytest.mark.slow
def test_from_a_text_to_a_strategy(folder):
    out = folder / "weights"
    result = run(folder, "-o", out, "--exit-layer=2", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["about"]["shape"] == {"exit_layer": 2} and facts["target_layers"] == 3
    again = run(folder, "-o", out, "--exit-layer=2")
    assert again.exit_code == 0 and "of the positions.\nWith drafts of" in again.stdout
    lm = decodax.load(folder / "model", dtype="float32")
    prompts, options = ["def f(a)", "x"], {"max_new_tokens": 12}
    plain = decodax.generate(lm, prompts, **options)
    found = decodax.generate(lm, prompts, strategy="kangaroo", draft=out, draft_tokens=2, **options)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert len(found.stats.proposed) == 2
    with pytest.raises(ValueError, match="needs auxiliary weights trained for model"):
        decodax.generate(lm, prompts, strategy="kangaroo", **options)
    with pytest.raises(ValueError, match="draft_tokens must be a whole number, got 'auto'"):
        decodax.generate(lm, prompts, strategy="kangaroo", draft=out, draft_tokens="auto", **options)


def test_the_command_fails_with_one_line(folder):
    result = run(folder, "-o", folder / "other", "--exit-layer=3")
    assert result.exit_code == 1 and "exit_layer must be in 1..2" in result.stderr
    assert not (folder / "other").exists()
