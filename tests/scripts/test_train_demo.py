"""The training script on a tiny model: it learns, resumes exactly, and its checkpoint loads with the same logits."""

import textwrap
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.decoding.training.checkpoint import read_progress, save_checkpoint
from decodax.decoding.training.loop import train
from decodax.models.model import Model
from decodax.scripts import demo_evaluation, demo_tokenizer, train_demo
from decodax.scripts.demo_corpus import Corpus, Document
from decodax.scripts.demo_trainer import Plan, make_task, mean_loss, text_windows

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
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_may_promote")]


@pytest.fixture(scope="module")
def tiny():
    model, forward, head = train_demo.functions(TINY)
    return forward, head, model.init(jax.random.key(0))


def test_the_loss_is_the_mean_of_minus_log_probability(tiny):
    forward, head, params = tiny
    rows = np.stack([ids[:8] for ids in CODE[:3]])
    logits = np.asarray(head(params, forward(params, jnp.asarray(rows[:, :-1]))), np.float64)
    log_probability = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    wanted = -np.mean([log_probability[b, t, rows[b, t + 1]] for b in range(3) for t in range(7)])
    # float32 with sums of at most 31 terms of size about one
    assert float(mean_loss(forward, head, params, rows)) == pytest.approx(wanted, rel=1e-5)


def test_a_run_learns_and_is_evaluated_on_held_out_rows(tiny, tmp_path):
    heldout = np.stack([np.append(0, ids[:7]) for ids in documents(2, 8)])
    plan = replace(PLAN, steps=40, decay_from=30, long_from=40)
    task = make_task(tiny, text_windows(CODE, TESTS, plan).at, heldout)
    before, after = (task.measure(p)["heldout_loss"] for p in (tiny[2], train(tmp_path, plan, task).params))
    assert before == pytest.approx(np.log(31), abs=1.0)  # an untrained model is near the uniform distribution
    assert after < before - 0.5


def test_training_resumes_with_the_run_s_own_plan_and_may_finish_earlier(tmp_path, monkeypatch):
    """The command from text to checkpoint and picture, on a small config and a few files."""
    text = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(40))
    tokenizer = demo_tokenizer.train([text], 300)
    functions = train_demo.functions(TINY | {"vocab_size": 300})
    monkeypatch.setattr(train_demo, "functions", lambda: functions)
    monkeypatch.setattr(train_demo, "run_tokenizer", lambda *_: tokenizer)
    monkeypatch.setattr(train_demo, "LOSS_IMAGE", tmp_path / "loss.png")
    kinds = [Document(f"{name}.py", name, text.replace("x", name), name == "t") for name in "abt"]
    monkeypatch.setattr(train_demo.demo_corpus, "collect", lambda: Corpus(kinds, kinds[:1], {}))
    train_demo.run_training(tmp_path / "run", replace(PLAN, window_tokens=7), None)
    assert read_progress(tmp_path / "run").step == 8
    with pytest.raises(ValueError, match="after the checkpoint's step 8, got 8"):
        train_demo.run_training(tmp_path / "run", PLAN, 8)
    train_demo.run_training(tmp_path / "run", Plan(steps=500, seed=9), 10)
    progress = read_progress(tmp_path / "run")
    assert (progress.step, progress.plan["steps"], progress.plan["seed"]) == (10, 10, 0)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_exported_folder_gives_the_same_logits(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_demo, "CONFIG", TINY)
    forward, head, params = tiny
    save_checkpoint(tmp_path / "run", 5, {}, {}, (params, {"momentum": jnp.ones(3)}))
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


def test_the_command_line_knows_its_plan(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_demo, "run_training", lambda *arguments: seen.append(arguments))
    train_demo.main(["train", "--run", str(tmp_path), "--steps", "300", "--peak", "0.004", "--finish-by", "200"])
    folder, plan, finish_by = seen[0]
    assert (folder, finish_by) == (tmp_path, 200)
    assert (plan.steps, plan.decay_from, plan.long_from, plan.peak) == (300, 195, 255, 0.004)
    with pytest.raises(SystemExit):
        train_demo.main(["train", "--pek", "0.004"])
