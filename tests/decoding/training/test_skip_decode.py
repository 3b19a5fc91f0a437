"""SkipDecode training: a LoRA adapter compensates for skipped layers, by the schedule that decoding follows."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax.decoding.auxiliary_weights import read_auxiliary_weights
from decodax.decoding.early_exit import SkipDecode
from decodax.decoding.strategies import METHODS
from decodax.decoding.training.distillation import kl_divergence, window_logits
from decodax.decoding.training.skip_decode import (
    SkipDecodeShape,
    SkipDecodeTraining,
    falling_layers,
    skipping_logits,
)
from decodax.layers.adapters.low_rank import merged
from tests.decoding.training.deep_target import LAYERS, PLAN, PROMPT, deep_target
from tests.decoding.training.deep_target import TEXTS as SPLIT
from tests.decoding.training.small import WINDOW

TARGET = deep_target()
# Evaluated on the training texts: a few steps on random weights do not generalise.
TEXTS = replace(SPLIT, heldout=SPLIT.train)
STEPS = replace(PLAN, peak=0.003).finishing_by(300)


def training(run, **fields):
    return SkipDecodeTraining(TARGET, SkipDecodeShape(**({"min_layers": 2, "rank": 8} | fields)), STEPS, TEXTS, run)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The training, its log, the folder written, the facts, and the target's weights as they were."""
    folder, before = tmp_path_factory.mktemp("skip_decode"), jax.tree.map(np.array, TARGET.params)
    run = training(folder / "run")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trained = run.train(report_every=50, measure_every=300)
    facts = run.export(folder / "out", trained.params, trained.step, folder / "loss.png", dtype="float32")
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return run, log, folder / "out", facts, before


@pytest.mark.slow
def test_it_learns_and_leaves_the_target_alone(finished):
    run, log, _, facts, before = finished
    jax.tree.map(np.testing.assert_array_equal, TARGET.params, before)
    untrained = run.measure(run.initial(), TEXTS.heldout_windows(WINDOW))
    found = facts["heldout"]
    assert found["heldout_loss"] < 0.8 * untrained["heldout_loss"]
    assert found["agreement_by_layers"][0][1] > untrained["agreement_by_layers"][0][1]
    assert log[-1]["heldout_loss"] == pytest.approx(facts["heldout"]["heldout_loss"])
    num_layers = [layers for layers, _ in facts["heldout"]["agreement_by_layers"]]
    assert num_layers == [2, 3] and untrained["agreement_by_layers"][1] == [3, 1.0]  # all layers, unchanged


@pytest.mark.slow
def test_the_first_loss_is_zero_with_all_layers_and_every_step_draws_another_schedule(tmp_path):
    rows = jnp.asarray(TEXTS.heldout_windows(WINDOW)[:5])
    whole, falling = training(tmp_path, min_layers=3), training(tmp_path)
    start = whole.initial()
    assert float(jax.jit(whole.loss)(start, TARGET.params, rows, jnp.int32(0))) < 1e-6
    loss = jax.jit(falling.loss)
    values = [float(loss(start, TARGET.params, rows, jnp.int32(step))) for step in (0, 1, 0)]
    assert values[0] == values[2] != values[1] and min(values) > 1e-3
    gradient = jax.jit(jax.grad(falling.loss))(start, TARGET.params, rows, jnp.int32(0))
    changed = {
        name: any(np.any(leaf != 0) for leaf in jax.tree.leaves(own)) for name, own in gradient["low_rank"].items()
    }
    assert changed == {f"blocks_{index}": True for index in range(LAYERS)}


def test_layers_fall_from_the_prompt_s_last_token():
    layer_policy = SkipDecode(max_layers=6, min_layers=2, decay_tokens=1)
    found = falling_layers(layer_policy, jnp.array([0, 3, 7, 8]), jnp.array([8, 2, 1, 1]), 9)
    assert found.tolist() == [
        [6, 6, 5, 5, 4, 4, 3, 3, 2],
        [6, 6, 6, 6, 4, 2, 2, 2, 2],
        [6, 6, 6, 6, 6, 6, 6, 6, 2],
        [6, 6, 6, 6, 6, 6, 6, 6, 6],
    ]


@pytest.mark.slow
def test_the_loss_is_that_of_its_definition(finished):
    """Token by token: the window up to it is run again, each token through its own layers, without later ones."""
    run, _, _, _, _ = finished
    tokens = jnp.asarray(TEXTS.heldout_windows(WINDOW)[:1, :7])
    number = jnp.array([[3, 3, 3, 2, 2, 2, 2]])
    found = jax.jit(lambda params: skipping_logits(TARGET.model, params, tokens, run.layer_policy, number))(
        TARGET.params
    )
    position = jnp.arange(7)[None]
    hidden = TARGET.model.embed(TARGET.params, tokens, position)
    hidden = TARGET.model.apply(TARGET.params, hidden, position, layers=(0, 1)).hidden
    three = TARGET.model.apply(TARGET.params, hidden[:, :3], position[:, :3], layers=(1, 2)).hidden
    hidden = jnp.concatenate([three, hidden[:, 3:]], axis=1)
    hidden = TARGET.model.apply(TARGET.params, hidden, position, layers=(2, 3)).hidden
    np.testing.assert_allclose(found, TARGET.model.logits(TARGET.params, hidden), atol=2e-5)
    target = window_logits(TARGET.model, TARGET.params, tokens)
    kl = np.asarray(kl_divergence(target, found))[0]
    assert np.all(np.abs(kl[:3]) < 1e-6) and np.all(kl[3:] > 1e-4)  # sums of 37 float32 terms


@pytest.mark.slow
def test_decoding_with_the_weights_is_the_forward_they_were_trained_for(finished):
    _, _, out, _, _ = finished
    speculation = METHODS["skip_decode"]().build(TARGET, out)
    assert speculation.layer_policy == SkipDecode(LAYERS, 2, 128) and speculation.params.keys() == TARGET.params.keys()
    change = read_auxiliary_weights(out, "float32").params["low_rank"]
    for got, want in zip(
        jax.tree.leaves(speculation.params), jax.tree.leaves(merged(TARGET.params, change)), strict=True
    ):
        np.testing.assert_array_equal(got, want)
    fast = SkipDecode(LAYERS, 2, 5)
    by_hand = decodax.decoding.strategies.Speculation(
        speculation.drafter, speculation.verifier, layer_policy=fast, params=speculation.params
    )
    out_tokens = decodax.generate(TARGET, [PROMPT], strategy=by_hand, max_new_tokens=12).tokens[0]
    text = jnp.concatenate([PROMPT, out_tokens])[None]
    number = fast.num_layers(jnp.maximum(jnp.arange(text.shape[1]) - (len(PROMPT) - 1), 0))[None]
    logits = jax.jit(lambda params: skipping_logits(TARGET.model, params, text, fast, number))(speculation.params)
    most_probable = np.argmax(logits, axis=-1)[0, len(PROMPT) - 1 : -1]
    np.testing.assert_array_equal(out_tokens, most_probable)


def test_what_does_not_fit_is_refused(finished, tmp_path):
    _, _, out, _, _ = finished
    with pytest.raises(ValueError, match="holds 'skip_decode'"):
        METHODS["first"]().build(TARGET, out)
    with pytest.raises(ValueError, match="max_layers must be at most 3"):
        training(tmp_path, max_layers=4)
    with pytest.raises(ValueError, match="0 <= warmup < min_layers"):
        training(tmp_path, min_layers=1)
