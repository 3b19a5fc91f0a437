"""Training of a draft on a tiny target: it learns, leaves the target unchanged, and loads from its folder."""

import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax.decoding.training.distillation import AcceptanceMeter, window_logits
from decodax.decoding.training.draft import DraftShape, DraftTraining, projected_embedding
from decodax.decoding.training.texts import Texts, hold_out
from tests.decoding.training.small import PLAN, TEXTS, documents

SHAPE = DraftShape(hidden_size=12, layers=1, heads=2, kv_heads=1, head_size=6, feed_forward=17)


@pytest.fixture(scope="module")
def finished(target, tmp_path_factory):
    """A trained draft: the training, its result, the exported folder, the facts returned, the target as it was."""
    folder, before = tmp_path_factory.mktemp("draft"), jax.tree.map(np.array, target.params)
    training = DraftTraining(target, SHAPE, PLAN, TEXTS, folder / "run")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trained = training.train(report_every=10, measure_every=10)
    facts = training.export(folder / "out", trained.params, trained.step, folder / "out" / "loss.png")
    return training, trained, folder / "out", facts, before


def test_the_draft_learns_and_the_target_stays_as_it_was(target, finished):
    training, _, _, _, before = finished
    jax.tree.map(np.testing.assert_array_equal, target.params, before)
    entries = [json.loads(line) for line in (training.run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [10, 20, 30, 40]
    first, *_, last = entries
    assert last["loss"] < 0.8 * first["loss"] and last["heldout_loss"] < 0.9 * first["heldout_loss"]
    assert last["sampling"] > first["sampling"]


def test_the_folder_is_read_back_the_same(target, finished):
    training, trained, out, _, _ = finished
    read = decodax.load(out, dtype="float32")
    assert read.tokenizer is None and read.end_token_ids == target.end_token_ids
    assert (read.config.vocab_size, read.config.max_position_embeddings) == (37, 512)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), trained.params)
    jax.tree.map(np.testing.assert_array_equal, read.params, rounded)
    tokens = jnp.asarray(TEXTS.heldout[0][None, :13])
    wanted = jax.jit(lambda params: window_logits(training.draft, params, tokens))(rounded)
    np.testing.assert_array_equal(
        jax.jit(lambda params: window_logits(read.model, params, tokens))(read.params), wanted
    )
    assert sorted(file.name for file in out.iterdir()) == [
        "config.json",
        "draft.json",
        "loss.png",
        "model.safetensors",
    ]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_facts_are_those_of_the_written_weights(target, finished):
    training, _, out, facts, _ = finished
    assert json.loads((out / "draft.json").read_text()) == facts
    read = decodax.load(out, dtype="float32")
    found = AcceptanceMeter(target.model, training.draft)(target.params, read.params, TEXTS.heldout_windows(14))
    wanted = found.__dict__ | {"rank_acceptance": list(found.rank_acceptance), "heldout_loss": found.kl}
    assert facts["heldout"] == wanted
    assert facts["trained_tokens"] == 40 * 3 * 14
    assert facts["num_parameters"] == 37 * 12 + 2 * 12 * 12 + 2 * 12 * 6 + 3 * 12 * 17 + 3 * 12
    assert facts["tokens_per_forward_at_4"]["greedy"] == pytest.approx(sum(found.greedy**i for i in range(5)))
    assert facts["target_vocab_size"] == 37


def test_a_folder_with_something_else_is_refused(finished, tmp_path):
    training, _, out, _, _ = finished
    training.refuse_foreign(out)
    training.refuse_foreign(tmp_path / "new")
    replace(training, plan=replace(PLAN, steps=80)).refuse_foreign(out)  # the same run, continued
    for other in (
        replace(training, shape=replace(SHAPE, layers=2)),
        replace(training, plan=replace(PLAN, seed=3)),
        replace(training, texts=replace(TEXTS, heldout=documents(5, 3))),
    ):
        with pytest.raises(ValueError, match="already holds another model"):
            other.refuse_foreign(out)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="already holds another model or other files"):
        training.refuse_foreign(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        training.refuse_foreign(tmp_path / "notes.txt")


def test_the_embedding_starts_as_the_best_approximation_of_the_target_s(target):
    table = np.asarray(target.params["embedding"], np.float64)
    left, values, _ = np.linalg.svd(table, full_matrices=False)
    best = (left[:, :12] * values[:12] ** 2) @ left[:, :12].T  # of all products of two tokens' embeddings
    found = np.asarray(projected_embedding(target.params["embedding"], 12), np.float64)
    assert found.shape == (37, 12)
    np.testing.assert_allclose(found @ found.T, best, atol=1e-4 * np.abs(best).max())  # float32 sums of 22 terms
    whole = np.asarray(projected_embedding(target.params["embedding"], 30), np.float64)
    assert whole.shape == (37, 30)
    np.testing.assert_allclose(whole @ whole.T, table @ table.T, atol=1e-4 * np.abs(best).max())


def test_a_missing_package_is_reported_before_training(target, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib is needed and not installed: pip install 'decodax\[train\]'"):
        DraftTraining(target, SHAPE, PLAN, TEXTS, tmp_path / "run").train()
    assert not (tmp_path / "run").exists()


def test_held_out_text_is_the_requested_share_and_is_not_trained_on():
    marked = [np.arange(100 * i, 100 * i + size, dtype=np.int32) for i, size in enumerate((13, 50, 7, 30))]
    train, heldout = hold_out(marked, 0.25, seed=0)
    assert sum(map(len, heldout)) == 25 and sum(map(len, train)) == 75
    np.testing.assert_array_equal(np.sort(np.concatenate(train + heldout)), np.sort(np.concatenate(marked)))
    (train,), (heldout,) = hold_out(marked[1:2], 0.1, seed=0)
    assert (train.tolist(), heldout.tolist()) == (list(range(100, 145)), list(range(145, 150)))
    chosen = {np.concatenate(hold_out(marked, 0.25, seed)[1]).tobytes() for seed in range(5)}
    assert len(chosen) > 1


def test_held_out_windows_are_spread_over_the_text():
    texts = Texts([], [np.arange(1, 1000, dtype=np.int32)], separator=(0,))
    windows = texts.heldout_windows(10)
    assert windows.shape == (64, 11) and windows[0, 0] == 0 and windows[-1, 0] >= 970
    with pytest.raises(ValueError, match=r"too little text is held out: .* need 1001, got 1000"):
        texts.heldout_windows(1000)


def test_fingerprints_of_texts_differ():
    same = replace(TEXTS, train=[ids.copy() for ids in TEXTS.train])
    assert same.fingerprint() == TEXTS.fingerprint()
    joined = [np.concatenate(TEXTS.train[:2]), *TEXTS.train[2:]]
    others = [replace(TEXTS, train=joined), replace(TEXTS, train=TEXTS.heldout, heldout=TEXTS.train)]
    others += [replace(TEXTS, separator=()), replace(TEXTS, rotating=TEXTS.heldout, heldout=[])]
    assert len({texts.fingerprint() for texts in (TEXTS, *others)}) == 5


def test_windows_longer_than_the_context_are_refused(target, tmp_path):
    with pytest.raises(ValueError, match=r"window_tokens must be at most 512 \(the target's context\), got 1024"):
        DraftTraining(target, SHAPE, replace(PLAN, window_tokens=1024, short_tokens=256), TEXTS, tmp_path)
