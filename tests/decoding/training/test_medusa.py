"""Medusa heads learn to predict further tokens, alone and together with a LoRA adapter that starts at zero."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import decoding
from decodax.decoding.auxiliary_weights import AuxiliaryWeights, read_auxiliary_weights
from decodax.decoding.drafters import MedusaHeads
from decodax.decoding.training.medusa import MedusaTraining, places, window_states
from decodax.decoding.training.medusa_joint import MedusaJointShape, MedusaJointTraining
from decodax.decoding.training.self_distillation import self_distilled
from decodax.decoding.training.texts import Texts
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.adapters.low_rank import merged
from decodax.models.medusa_heads import MedusaShape, initial_heads
from tests.decoding.training.small import PLAN
from tests.speculation import disturbed

SHAPE = MedusaShape(heads=3)
JOINT = MedusaJointShape(heads=3, rank=4)
ROWS = np.random.default_rng(3).integers(1, 37, (3, 15)).astype(np.int32)
STEP = jnp.int32(5)
# Sums over the 37 logits of a distribution and over positions, in float32; losses are about 10.
TOLERANCE = 1e-5


def counting(seed, count):
    """Texts that count up from a random start: every token but the first is predictable."""
    draw = np.random.default_rng(seed)
    return [(1 + (draw.integers(36) + np.arange(30)) % 36).astype(np.int32) for _ in range(count)]


TEXTS = Texts(counting(0, 9), counting(1, 3), separator=(0,))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.sum(np.exp(logits - logits.max(-1, keepdims=True)), -1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def oracle_surprise(params, heads, normed, label, at):
    """For each head, minus the log-probability of its labels at the positions that have one."""
    found, output = [], np.asarray(params["head"], np.float64)
    for index in range(len(heads)):
        weights, state = heads[f"head_{index}"]["block_0"], np.asarray(normed, np.float64)
        inner = state @ np.asarray(weights["weight"], np.float64).T + np.asarray(weights["bias"], np.float64)
        logprobs = log_softmax((state + inner / (1 + np.exp(-inner))) @ output.T)
        seen = [position for position in at if position + index + 2 < label.shape[1]]
        found.append([[-logprobs[row, i, label[row, i + index + 2]] for i in seen] for row in range(len(label))])
    return found


def own_labels(target, normed):
    """The rows with every token replaced by the model's most probable one."""
    logits = np.asarray(normed, np.float64) @ np.asarray(target.params["head"], np.float64).T
    return np.concatenate([ROWS[:, :1], np.argmax(logits, axis=2)], axis=1)


@pytest.mark.parametrize(("labels", "stride"), [("text", 1), ("model", 1), ("model", 3)])
@pytest.mark.quick_cases(1)
def test_the_loss_of_heads_alone(target, tmp_path, labels, stride):
    training = MedusaTraining(target, SHAPE, PLAN, TEXTS, tmp_path, labels, stride)
    heads = disturbed(initial_heads(target.params, SHAPE), 0.3, seed=5)
    normed = jax.jit(partial(window_states, target.model))(target.params, jnp.asarray(ROWS[:, :-1]))
    label = ROWS if labels == "text" else own_labels(target, normed)
    at = [place for place in np.asarray(places(STEP, stride, 14)).tolist() if place < 14]
    assert at == list(range(at[0], 14, stride)) and at[0] < stride
    surprise = oracle_surprise(target.params, heads, normed, label, at)
    want = sum(0.8**k * np.mean(one) for k, one in enumerate(surprise))
    found = jax.jit(training.loss)({"heads": heads}, target.params, ROWS, STEP)
    assert float(found) == pytest.approx(want, rel=TOLERANCE)


def test_strided_positions_start_at_any_offset():
    assert {int(places(step, 4, 14)[0]) for step in range(40)} == {0, 1, 2, 3}


@pytest.fixture(scope="module")
def finished(target, tmp_path_factory):
    """Heads trained alone: the training, its folder, the facts."""
    folder = tmp_path_factory.mktemp("medusa")
    training = MedusaTraining(target, SHAPE, PLAN, TEXTS, folder / "run", "text")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trained = training.train(report_every=10, measure_every=10)
    facts = training.export(folder / "out", trained.params, trained.step, folder / "out" / "loss.png", dtype="float32")
    return training, folder / "out", facts


@pytest.mark.slow
def test_heads_learn_and_their_accuracy_is_recorded(target, finished):
    training, out, facts = finished
    entries = [json.loads(line) for line in (training.run / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["loss"] < 0.7 * entries[0]["loss"]
    assert entries[-1]["heldout_loss"] < 0.85 * entries[0]["heldout_loss"]
    weights = read_auxiliary_weights(out, "float32")
    assert weights.kind == "medusa" and weights.shape == {"heads": 3, "blocks": 1, "tied": True}
    assert facts["num_parameters"] == 3 * (22 * 22 + 22)
    windows = TEXTS.heldout_windows(14)
    ranks, surprise, counted = np.zeros((3, 10)), np.zeros(3), np.zeros(3)
    for row in windows:
        tokens = jnp.asarray(row[None, :-1])
        normed = window_states(target.model, target.params, tokens)[0]
        wanted = np.argmax(np.asarray(normed @ target.params["head"].T), axis=1)  # the model's token t + 1 at t
        for head in range(3):
            logits = -np.concatenate(
                [
                    oracle_surprise(
                        target.params, weights.params["heads"], normed[None], np.full((1, 17), token), range(14)
                    )[head]
                    for token in range(37)
                ]
            )
            for position in range(14 - head - 1):
                order = np.argsort(-logits[:, position], kind="stable")
                rank = int(np.flatnonzero(order == wanted[position + head + 1])[0])
                if rank < 10:
                    ranks[head, rank] += 1
                surprise[head] -= logits[row[position + head + 2], position]
                counted[head] += 1
    np.testing.assert_allclose(facts["heldout"]["rank_accuracy"], ranks / counted[:, None], atol=1e-12)
    loss = np.sum(surprise / counted * 0.8 ** np.arange(3))
    assert facts["heldout"]["heldout_loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert facts["heldout"]["greedy"] == facts["heldout"]["distance_1"] == facts["heldout"]["rank_accuracy"][0][0]


@pytest.mark.slow
def test_the_strategy_by_name(target, finished):
    _, out, _ = finished
    prompts = [[1, 2, 3], [30, 31]]
    plain = decodax.generate(target, prompts, max_new_tokens=20)
    found = decodax.generate(target, prompts, max_new_tokens=20, strategy="medusa", draft=out)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    assert found.stats.strategy == "medusa" and len(found.stats.accepted) <= 3
    with pytest.raises(ValueError, match="draft_tokens must be a whole number, at least 1, or 'auto', got 0"):
        decodax.generate(target, prompts, strategy="medusa", draft=out, draft_tokens=0)
    with pytest.raises(ValueError, match="needs auxiliary weights trained for tiny: pass draft=FOLDER"):
        decodax.generate(target, prompts, strategy="medusa")


def joint(target, finished, folder, **options):
    start = read_auxiliary_weights(finished[1], "float32")
    return MedusaJointTraining(target, JOINT, PLAN, TEXTS, folder, "text", start=start, **options)


@pytest.mark.slow
def test_the_joint_loss_begins_with_an_unchanged_model(target, finished, tmp_path):
    """KL(original || changed) is 0 at step 0, and what is left is a fifth of the heads' loss."""
    training = joint(target, finished, tmp_path)
    heads_alone = finished[0].loss({"heads": training.initial()["heads"]}, target.params, ROWS, STEP)
    found = training.loss(training.initial(), target.params, ROWS, STEP)
    assert float(found) - 0.2 * float(heads_alone) == pytest.approx(0, abs=1e-6)
    by_text = joint(target, finished, tmp_path, keep="text").loss(training.initial(), target.params, ROWS, STEP)
    normed = window_states(target.model, target.params, jnp.asarray(ROWS[:, :-1]))
    logprobs = log_softmax(np.asarray(normed, np.float64) @ np.asarray(target.params["head"], np.float64).T)
    want = -np.mean(np.take_along_axis(logprobs, ROWS[:, 1:, None], axis=2))
    assert float(by_text) - float(found) == pytest.approx(want, rel=TOLERANCE)


def test_the_measured_joint_loss_is_the_model_s_and_a_fifth_of_the_heads(target, finished, tmp_path):
    """Of an unchanged model: its divergence is 0, or with keep="text" its own loss on the text."""
    alone = finished[0].measure({"heads": joint(target, finished, tmp_path).initial()["heads"]}, ROWS)["heldout_loss"]
    found, by_text = (
        training.measure(training.initial(), ROWS)
        for training in (joint(target, finished, tmp_path), joint(target, finished, tmp_path, keep="text"))
    )
    assert found["kl"] == pytest.approx(0, abs=1e-6) and found["unchanged"] == 1
    assert found["heldout_loss"] == pytest.approx(0.2 * alone, rel=1e-5) and alone > 1
    assert by_text["heldout_loss"] > found["heldout_loss"] + 1


def test_the_joint_loss_of_a_changed_model(target, finished, tmp_path):
    training = joint(target, finished, tmp_path)
    trained = training.initial()
    trained["low_rank"] = disturbed(trained["low_rank"], 0.5)
    changed = merged(target.params, trained["low_rank"], 0.25)
    one, other = (window_states(target.model, params, jnp.asarray(ROWS[:, :-1])) for params in (target.params, changed))
    output = np.asarray(target.params["head"], np.float64)
    before, after = (log_softmax(np.asarray(normed, np.float64) @ output.T) for normed in (one, other))
    divergence = np.mean(np.sum(np.exp(before) * (before - after), axis=2))
    surprise = oracle_surprise(target.params, trained["heads"], other, ROWS, range(14))
    want = divergence + 0.2 * sum(0.8**k * np.mean(one) for k, one in enumerate(surprise))
    assert divergence > 0.01
    assert float(training.loss(trained, target.params, ROWS, STEP)) == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.slow
def test_joint_training_changes_the_named_matrices_and_decodes_the_changed_model(target, finished, tmp_path):
    before = jax.tree.map(np.array, target.params)
    training = joint(target, finished, tmp_path / "run")
    trained = training.train(report_every=20, measure_every=40)
    facts = training.export(tmp_path / "out", trained.params, trained.step, tmp_path / "loss.png", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, target.params, before)
    weights = read_auxiliary_weights(tmp_path / "out", "float32")
    assert set(weights.params) == {"heads", "low_rank"} and set(weights.params["low_rank"]) == {"blocks_0"}
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(weights.params["low_rank"]))
    assert 0 < facts["heldout"]["kl"] < 1 and 0 < facts["heldout"]["unchanged"] <= 1
    entries = [json.loads(line) for line in (training.run / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["loss"] < entries[0]["loss"]

    changed = dataclasses.replace(target, params=merged(target.params, weights.params["low_rank"], 0.25))
    plain = decodax.generate(changed, [[1, 2, 3]], max_new_tokens=20)
    found = decodax.generate(target, [[1, 2, 3]], max_new_tokens=20, strategy="medusa", draft=tmp_path / "out")
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.logprobs[0], plain.logprobs[0], atol=2e-5)
    unchanged = decodax.generate(target, [[1, 2, 3]], max_new_tokens=20)
    assert np.abs(found.logprobs[0] - unchanged.logprobs[0]).max() > 1e-3


def test_the_model_s_own_continuations(target):
    documents = [*counting(4, 3), np.arange(1, 5, dtype=np.int32)]
    written = self_distilled(target, documents, 5, seed_tokens=6, new_tokens=9, seed=1)
    assert len(written) == 5 and all(len(ids) <= 15 for ids in written)
    pieces = {tuple(ids[i : i + 6]) for ids in documents for i in range(len(ids) - 5)}
    assert all(tuple(ids[:6]) in pieces for ids in written) and len({tuple(ids[:6]) for ids in written}) > 1
    for ids in written:
        follows = decodax.generate(target, [ids[:6]], max_new_tokens=9).tokens[0]
        np.testing.assert_array_equal(ids[6:], follows)
    again = self_distilled(target, documents, 5, seed_tokens=6, new_tokens=9, seed=1)
    assert all(np.array_equal(one, other) for one, other in zip(written, again, strict=True))
    with pytest.raises(ValueError, match="no document holds the 31 tokens of a seed"):
        self_distilled(target, documents, 5, seed_tokens=31)
    with pytest.raises(ValueError, match="at most the context of 512, got 1, 500 and 13"):
        self_distilled(target, documents, 1, seed_tokens=500, new_tokens=13)


def test_bad_input(target, finished, tmp_path):
    def alone(shape=SHAPE, **options):
        return MedusaTraining(target, shape, PLAN, TEXTS, tmp_path, **options)

    with pytest.raises(ValueError, match=r"labels must be one of \('model', 'text'\), got 'truth'"):
        alone(labels="truth")
    with pytest.raises(ValueError, match=r"stride must be in 1\.\.14 \(tokens of a row\), got 15"):
        alone(stride=15)
    with pytest.raises(ValueError, match="more tokens than there are heads, 14, got short_tokens 14"):
        alone(MedusaShape(heads=14))
    with pytest.raises(ValueError, match="rank and change_scale must be positive, got 0"):
        MedusaJointShape(rank=0)
    with pytest.raises(ValueError, match="keep must be one of"):
        joint(target, finished, tmp_path, keep="everything")
    start = read_auxiliary_weights(finished[1], "float32")
    for other, message in (
        (dataclasses.replace(start, params=start.params | {"low_rank": {}}), "heads that were trained alone"),
        (AuxiliaryWeights("ppd", start.params, start.facts, "prompts"), "got prompts, which holds 'ppd'"),
    ):
        with pytest.raises(ValueError, match=message):
            MedusaJointTraining(target, JOINT, PLAN, TEXTS, tmp_path, start=other)
    with pytest.raises(ValueError, match=r"\(heads, blocks, tied\) \(2, 1, True\), got \(3, 1, True\)"):
        MedusaJointTraining(target, dataclasses.replace(JOINT, heads=2), PLAN, TEXTS, tmp_path, start=start)
    with pytest.raises(ValueError, match="can be as deep as there are heads, 3, got depth 4"):
        made = decoding.Speculation(MedusaHeads(target.model, (-1, 0, 1, 2, 3)), ExactMatch(), start.params["heads"])
        decodax.generate(target, [[1, 2]], strategy=made)
