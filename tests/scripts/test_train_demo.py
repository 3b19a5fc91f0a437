"""The training script on a tiny model: it learns, it resumes exactly, and what it writes is read back the same."""

import json
import os
import signal
import textwrap
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from decodax.models.model import Model
from decodax.scripts import demo_evaluation, demo_tokenizer, demo_trainer, train_demo
from decodax.scripts.demo_trainer import Batches, Plan

TINY = train_demo.CONFIG | {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 17,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
}
PLAN = Plan(
    optimizer="adamw",
    steps=8,
    decay_from=5,
    long_from=6,
    warmup=2,
    peak=0.02,
    windows_per_step=2,
    window_tokens=14,
    short_tokens=7,
)


def documents(seed, count):
    """Token ids from 1 on in rising runs: easy to learn, and different in every document."""
    draw = np.random.default_rng(seed)
    return [(1 + (draw.integers(30) + np.arange(draw.integers(20, 40))) % 30).astype(np.int32) for _ in range(count)]


CODE, TESTS = documents(0, 5), documents(1, 7)


@pytest.fixture(autouse=True)
def optax_may_promote():
    """optax's bias correction multiplies float32 by an integer count; the rest of the suite forbids such mixtures."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def tiny():
    model, forward, head = train_demo.functions(TINY)
    return forward, head, model.init(jax.random.key(0))


def test_the_learning_rate_rises_stays_and_falls():
    plan = Plan(steps=100, decay_from=64, warmup=10, peak=0.5)
    assert [plan.learning_rate(step) for step in (0, 4, 9, 40, 64)] == [0.05, 0.25, 0.5, 0.5, 0.5]
    assert plan.learning_rate(73) == pytest.approx(0.25)  # a quarter of the way down: 1 - sqrt(1 / 4)
    assert plan.learning_rate(100) == 0.0


def test_a_plan_finishes_earlier_but_not_in_the_past():
    plan = Plan(steps=2000).finishing_by(1000, now=700)
    assert (plan.steps, plan.decay_from, plan.long_from) == (1000, 700, 850)
    assert plan.finishing_by(1000, now=700) == plan
    with pytest.raises(ValueError, match="after the checkpoint's step 700, got 700"):
        plan.finishing_by(700, now=700)


def test_a_pass_reads_every_token_about_once():
    batches = Batches(CODE, TESTS, replace(PLAN, long_from=10**6, test_share=0.0))
    first, count = 0, len(batches._one_pass(0))
    read = np.concatenate([batches.at(step)[:, :-1].ravel() for step in range(first, count // PLAN.windows_per_step)])
    there = np.concatenate([np.append(0, ids) for ids in CODE])
    missing = np.bincount(there, minlength=31) - np.bincount(read, minlength=31)
    # What fills no window, and the window that fills no step, are left out; nothing is read twice.
    assert missing.min() >= 0 and missing.sum() <= PLAN.window_tokens * PLAN.windows_per_step


def test_rows_have_the_plan_s_shape_and_overlap_by_their_targets():
    batches = Batches(CODE, TESTS, PLAN)
    short, long = batches.at(PLAN.long_from - 1), batches.at(PLAN.long_from)
    assert short.shape == (4, 8) and long.shape == (2, 15)
    assert (short[0, -1], short[2, -1]) == (short[1, 0], short[3, 0])  # two halves of one window


def test_a_step_s_rows_follow_from_the_step_alone():
    forwards, backwards = Batches(CODE, TESTS, PLAN), Batches(CODE, TESTS, PLAN)
    steps = range(30)  # several passes
    expected = [forwards.at(step) for step in steps]
    for step in reversed(steps):
        np.testing.assert_array_equal(backwards.at(step), expected[step])
    assert not np.array_equal(Batches(CODE, TESTS, replace(PLAN, seed=1)).at(0), expected[0])


def test_passes_rotate_through_the_tests():
    marked = [np.full(20, 40 + i, np.int32) for i in range(8)]
    batches = Batches(CODE, marked, replace(PLAN, test_share=0.25))
    for number in range(4):
        seen = set(np.unique(batches._one_pass(number))) - set(range(31))
        assert seen <= {40 + number, 44 + number}  # a quarter of eight, another one in each pass


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="more tokens than one step"):
        Batches(CODE[:1], TESTS, Plan())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_few_steps_lower_the_loss_and_the_update_is_scaled_by_the_rate(tiny, optimizer):
    forward, head, params = tiny
    chain = demo_trainer.make_optimizer(replace(PLAN, optimizer=optimizer))
    step, state = demo_trainer.make_step(forward, head, chain), chain.init(params)
    rows = jnp.asarray(Batches(CODE, TESTS, PLAN).at(0))
    before = jax.tree.map(np.asarray, params)
    params, state, first = step(jax.tree.map(jnp.copy, params), state, rows, np.float32(0.0))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    for _ in range(15):
        params, state, last = step(params, state, rows, np.float32(0.02))
    assert first == pytest.approx(np.log(31), abs=1.0)  # an untrained model is near the uniform distribution
    assert last < first - 0.5


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="must be muon or adamw, got 'sgd'"):
        demo_trainer.make_optimizer(replace(PLAN, optimizer="sgd"))


def run(folder, tiny, batches=Batches, **options):
    forward, head, params = tiny
    fresh = jax.tree.map(jnp.copy, params)
    options = {"report_every": 2, "checkpoint_seconds": 1e9} | options
    return demo_trainer.train(folder, PLAN, lambda p: batches(CODE, TESTS, p), (forward, head, fresh), **options)


class Interrupting(Batches):
    """Asks its own process to terminate while the fourth step's rows are fetched."""

    def at(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().at(step)


def test_an_interrupted_run_ends_with_the_same_weights(tiny, tmp_path):
    heldout = np.stack([np.append(0, ids[:7]) for ids in documents(2, 8)])
    whole = run(tmp_path / "whole", tiny, heldout=heldout)
    partial = run(tmp_path / "parts", tiny, Interrupting, heldout=heldout)
    with safe_open(tmp_path / "parts" / "checkpoint.safetensors", "numpy") as opened:
        assert opened.metadata()["step"] == "4"  # the step under way is finished, and no other is begun
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, partial, whole)
    resumed = run(tmp_path / "parts", tiny, heldout=heldout)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for log in logs:
        for entry in log:
            del entry["tokens/s"]
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[0]] == [2, 4, 6, 8] and "heldout_loss" in logs[0][-1]


def test_an_exported_folder_gives_the_same_logits(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_demo, "CONFIG", TINY)
    forward, head, params = tiny
    demo_trainer.save_checkpoint(tmp_path / "run", 5, PLAN, (params, {"momentum": jnp.ones(3)}))
    text = "def f(x):\n    return x\n"
    demo_tokenizer.save(demo_tokenizer.train([text], 300), tmp_path / "run", 14)
    train_demo.export(tmp_path / "run", tmp_path / "model")
    read, tokenizer = train_demo.load_exported(tmp_path / "model")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    tokens = jnp.asarray(CODE[0][None, :13])
    wanted, got = (head(p, forward(p, tokens)) for p in (params, read))
    # bfloat16 keeps 8 bits: each weight is off by up to 2^-9 of itself, and a logit sums a few such layers.
    np.testing.assert_allclose(got, wanted, atol=0.03 * float(np.abs(wanted).max()))
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path):
    demo_trainer.save_checkpoint(tmp_path, 1, PLAN, tiny[2])
    larger = train_demo.read_config(TINY | {"hidden_size": 18})[1]
    with pytest.raises(ValueError, match="belongs to another model or optimizer"):
        demo_trainer.load_checkpoint(tmp_path, Model(larger).init(jax.random.key(0)))
    with pytest.raises(FileNotFoundError, match="train first"):
        demo_trainer.load_params(tmp_path / "nothing")


def test_the_default_model_has_about_six_million_parameters():
    config = train_demo.read_config(train_demo.CONFIG)[1]
    shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
    sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
    assert sum(sizes) == 6_557_952
    assert 2 * sum(sizes) < 16e6  # bytes in bfloat16


def test_the_embedded_model_predicts_code_it_has_not_seen():
    """The weights in the repository, on a held-out file that every Python brings; uniform bytes would cost 8 bits."""
    params, tokenizer = train_demo.load_exported(train_demo.DEMO_FOLDER)
    text = Path(textwrap.__file__).read_text()[:2000]
    ids = np.asarray(tokenizer.encode(text).ids)
    assert tokenizer.decode(ids) == text
    _, forward, head = train_demo.functions()
    bits = demo_evaluation.model_bits(lambda p, tokens: head(p, forward(p, tokens)), params, [ids], context=128)
    assert bits < 2.0 * len(text.encode())


def test_the_loss_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0, "heldout_loss": 2.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_demo.draw_loss(tmp_path / "log.jsonl", tmp_path / "images" / "loss.png")
    assert (tmp_path / "images" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line_knows_its_plan(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_demo, "run_training", lambda *arguments: seen.append(arguments))
    train_demo.main(["train", "--run", str(tmp_path), "--steps", "300", "--peak", "0.004", "--finish-by", "200"])
    folder, plan, finish_by = seen[0]
    assert (folder, finish_by) == (tmp_path, 200)
    assert (plan.steps, plan.decay_from, plan.long_from, plan.peak) == (300, 195, 255, 0.004)
    with pytest.raises(SystemExit):
        train_demo.main(["train", "--pek", "0.004"])
