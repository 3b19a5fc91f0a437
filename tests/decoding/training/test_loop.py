"""The training loop on a task of a dozen numbers: it learns, leaves frozen weights alone, and resumes bit for bit."""

import json
import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from decodax.decoding.training.checkpoint import load_trained, load_tree, read_progress, save_checkpoint
from decodax.decoding.training.extra import need
from decodax.decoding.training.loop import Task, make_step, resumed_plan, train
from decodax.decoding.training.loss_curve import draw_loss
from decodax.decoding.training.optimizer import make_optimizer
from decodax.decoding.training.plan import Plan

PLAN = Plan(
    steps=8, decay_from=5, long_from=6, warmup=2, peak=0.02, windows_per_step=3, window_tokens=4, short_tokens=2
)
FROZEN = {"truth": jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)}


def loss(trained, frozen, rows, step):
    """Squared distance of two linear maps of the rows, of which one is given."""
    wanted = jnp.einsum("bt,td->bd", rows.astype(jnp.float32), frozen["truth"])
    found = jnp.einsum("bt,td->bd", rows.astype(jnp.float32), trained["layer"]["matrix"]) + trained["bias"]
    return jnp.mean((wanted - found) ** 2)


def rows(step):
    return np.random.default_rng(step).integers(-3, 4, size=(3, 5))


def task(**changes):
    trained = {"layer": {"matrix": jnp.zeros((5, 7))}, "bias": jnp.zeros(7)}
    measure = lambda params: {"heldout_loss": float(loss(params, FROZEN, rows(10**6), 0))}
    return replace(Task(loss, trained, rows, FROZEN, measure, {"text": "abc"}), **changes)


def run(folder, plan=PLAN, **changes):
    return train(folder, plan, task(**changes), report_every=2, measure_every=4, checkpoint_seconds=1e9)


def log_of(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        del entry["tokens/s"]
    return entries


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_few_steps_lower_the_loss_and_the_update_is_scaled_by_the_rate(optimizer):
    chain = make_optimizer(replace(PLAN, optimizer=optimizer))
    trained = jax.tree.map(jnp.copy, task().trained)
    step, state = make_step(loss, chain), chain.init(trained)
    before = jax.tree.map(np.asarray, task().trained)
    trained, state, first = step(trained, state, FROZEN, rows(0), np.int32(0), np.float32(0.0))
    jax.tree.map(np.testing.assert_array_equal, trained, before)
    for _ in range(30):
        trained, state, last = step(trained, state, FROZEN, rows(0), np.int32(0), np.float32(0.05))
    assert last < 0.7 * first


def test_the_speed_is_the_tokens_since_the_last_report_over_their_seconds(tmp_path, monkeypatch):
    """With a clock that moves a second at each look; rows of 5 tokens predict 4."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("decodax.decoding.training.loop.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    run(tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # Two steps of three rows. The loop looks at the clock after each step, and for a report twice.
    assert [entry["tokens/s"] for entry in entries] == [2 * 3 * 4 / seconds for seconds in (2, 3, 3, 3)]


@pytest.mark.parametrize("asked_by", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, asked_by):
    def interrupting(step):
        if step == 3:
            os.kill(os.getpid(), asked_by)
        return rows(step)

    frozen = jax.tree.map(np.array, FROZEN)
    whole = run(tmp_path / "whole")
    assert (whole.step, whole.finished) == (8, True)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    partial = run(tmp_path / "parts", rows=interrupting)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    # The current step is finished, and no other is begun.
    assert (partial.step, partial.finished, read_progress(tmp_path / "parts").step) == (4, False, 4)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, partial.params, whole.params)
    resumed = run(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, FROZEN, frozen)
    jax.tree.map(
        np.testing.assert_array_equal, load_trained(tmp_path / "parts"), jax.tree.map(np.asarray, whole.params)
    )
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert [entry["step"] for entry in log_of(tmp_path / "whole")] == [2, 4, 6, 8]
    assert ["heldout_loss" in entry for entry in log_of(tmp_path / "whole")] == [False, True, False, True]


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As for a command that `nohup` or a script's & has started."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = run(tmp_path, rows=lambda step: (os.kill(os.getpid(), signal.SIGINT), rows(step))[1])
        assert found.finished and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_it_reports_how_many_steps_would_be_lost(tmp_path):
    reported = []
    for seconds, expected in ((0.0, [1, 0] * 8 + [0]), (1e9, [*range(1, 9), 0])):
        train(tmp_path / str(seconds), PLAN, task(), checkpoint_seconds=seconds, unsaved=reported.append)
        assert reported == expected
        reported.clear()


def test_a_finished_run_does_no_further_step(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, rows=lambda step: pytest.fail("a step was begun"))
    assert again.finished
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


def test_log_lines_after_the_checkpoint_are_cut_off(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 2, "loss": 1.0}\n{"step": 6, "loss": 0.5}\n')
    save_checkpoint(tmp_path, 4, {}, {"text": "abc"}, (task().trained, make_optimizer(PLAN).init(task().trained)))
    run(tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 6, 8] and entries[1]["loss"] != 0.5


def test_a_changed_run_is_refused_and_a_moved_end_is_not(tmp_path):
    run(tmp_path, replace(PLAN, steps=4))
    with pytest.raises(ValueError, match=r"other settings: peak was 0.02, now 0.5; seed was 0, now 3\. Give"):
        resumed_plan(tmp_path, replace(PLAN, peak=0.5, seed=3))
    with pytest.raises(ValueError, match="text was 'abc', now 'xyz'"):
        run(tmp_path, replace(PLAN, steps=4), about={"text": "xyz"})
    with pytest.raises(ValueError, match="after the checkpoint's step 4, got 3"):
        resumed_plan(tmp_path, replace(PLAN, steps=3))
    moved = resumed_plan(tmp_path, replace(PLAN, steps=100))
    assert (moved.steps, moved.decay_from, moved.long_from) == (100, 65, 65)
    assert resumed_plan(tmp_path, replace(PLAN, steps=4, decay_from=1)).decay_from == PLAN.decay_from
    assert resumed_plan(tmp_path / "new", PLAN) is PLAN


def test_a_nonfinite_loss_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    run(tmp_path, replace(PLAN, steps=2))
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(FloatingPointError, match="became nan near step 4; start again with a lower learning rate"):
        run(tmp_path, frozen={"truth": FROZEN["truth"] * jnp.nan})
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_checkpoints_are_replaced_and_foreign_ones_refused(tmp_path):
    save_checkpoint(tmp_path, 1, {"steps": 3}, {}, {"a": np.zeros(3)})
    save_checkpoint(tmp_path, 2, {"steps": 3}, {}, {"a": np.ones(3)})
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    with safe_open(tmp_path / "checkpoint.safetensors", "numpy") as opened:
        assert opened.metadata()["step"] == "2"
    np.testing.assert_array_equal(load_tree(tmp_path, {"a": np.zeros(3)})["a"], np.ones(3))
    with pytest.raises(ValueError, match=r"another model or optimizer: 1 leaves differ, such as \['a'\]"):
        load_tree(tmp_path, {"a": np.zeros(4)})
    with pytest.raises(FileNotFoundError, match="train first"):
        load_trained(tmp_path / "nothing")
    (tmp_path / "checkpoint.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="is no checkpoint of a training run"):
        read_progress(tmp_path)


def test_the_loss_curve_is_drawn(tmp_path):
    lines = [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0, "heldout_loss": 2.5, "agreement": 0.4}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_loss(tmp_path / "log.jsonl", tmp_path / "images" / "loss.png", title="One")
    draw_loss(tmp_path / "log.jsonl", tmp_path / "images" / "two.png", title="Two", shares={"agreement": "agreement"})
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == ["loss.png", "two.png"]
    sizes = [np.frombuffer(file.read_bytes()[16:24], ">u4") for file in files]  # width and height in a PNG's header
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert sizes[0][1] == sizes[1][1] and sizes[0][0] < sizes[1][0]


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(ImportError, match=r"optax is needed and not installed: pip install 'decodax\[train\]'"):
        need("optax")
