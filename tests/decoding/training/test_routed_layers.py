"""FiRST layer gates learn to skip more layers for a higher price; then a LoRA adapter compensates for them."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax
from decodax import decoding
from decodax.decoding.auxiliary_weights import read_auxiliary_weights
from decodax.decoding.early_exit import RoutedLayers
from decodax.decoding.strategies import METHODS
from decodax.decoding.training.distillation import kl_divergence, window_logits
from decodax.decoding.training.routed_layers import (
    LayerGateTraining,
    RoutedChangeShape,
    RoutedChangeTraining,
    RoutedShape,
    routed_logits,
    soft_losses,
)
from tests.decoding.training.deep_target import LAYERS, PLAN, PROMPT, TEXTS, deep_target
from tests.decoding.training.small import WINDOW

TARGET = deep_target()
WIDTH = TARGET.config.hidden_size
LAYER_GATES = {"weight": 3 * jax.random.normal(jax.random.key(2), (LAYERS, WIDTH)), "bias": jnp.zeros(LAYERS)}
SKIPPING = {"weight": jnp.zeros((LAYERS, WIDTH)), "bias": jnp.full(LAYERS, 9.0)}
POLICY = RoutedLayers(kept_first=0)


@pytest.fixture(scope="module")
def layer_gates(tmp_path_factory):
    """Stage one for three prices: facts, log and folder of each."""
    folder, found = tmp_path_factory.mktemp("layer_gates"), []
    for price in (0.0, 3.0, 30.0):
        run = folder / f"run{price}"
        training = LayerGateTraining(TARGET, RoutedShape(regulariser=price), replace(PLAN, peak=0.2), TEXTS, run)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            trained = training.train(report_every=10, measure_every=30)
        facts = training.export(folder / str(price), trained.params, trained.step, run / "loss.png", dtype="float32")
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        found.append((facts, log, folder / str(price)))
    return found


@pytest.mark.slow
def test_a_higher_price_skips_more(layer_gates):
    found = [facts["heldout"] for facts, _, _ in layer_gates]
    rates = [heldout["skip_rate"] for heldout in found]
    assert rates[0] == 0 and found[0]["greedy"] == 1 and abs(found[0]["kl"]) < 1e-6
    assert rates == sorted(rates) and rates[-1] == pytest.approx(1 / LAYERS)  # all that is left to the layer gates
    assert found[-1]["skipped_by_layer"] == [0, 1, 0] and found[-1]["greedy"] < 1
    for _, log, _ in layer_gates[1:]:
        assert log[-1]["loss"] < log[0]["loss"]


def test_the_loss_of_the_layer_gates_is_that_of_its_definition():
    """In NumPy, from the layers' own outputs: what a layer adds, times the probability that it runs."""
    tokens = jnp.asarray(TEXTS.heldout_windows(WINDOW)[:2, :-1])
    shape = RoutedShape(regulariser=0.7, decisiveness=0.3, kept_first=0)
    params = TARGET.params | {"layer_gates": LAYER_GATES}
    found = jax.jit(lambda: soft_losses(TARGET.model, shape, TARGET.params, params, tokens))()
    apply = jax.jit(TARGET.model.apply, static_argnames="layers")
    position = jnp.broadcast_to(jnp.arange(WINDOW), tokens.shape)
    hidden, skips = np.asarray(TARGET.model.embed(TARGET.params, tokens, position)), []
    for index in range(LAYERS):
        new = np.asarray(apply(TARGET.params, jnp.asarray(hidden), position, layers=(index, index + 1)).hidden)
        if index == LAYERS - 1:
            hidden = new
            continue
        unit = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True))
        skip = 1 / (1 + np.exp(-unit @ np.asarray(LAYER_GATES["weight"][index])))
        skips.append(skip.mean(axis=1))
        hidden = hidden + (1 - skips[-1])[:, None, None] * (new - hidden)

    @jax.jit
    def divergence(hidden):
        logits = TARGET.model.logits(TARGET.params, hidden)
        return kl_divergence(window_logits(TARGET.model, TARGET.params, tokens), logits)

    kl = np.asarray(divergence(jnp.asarray(hidden))).mean(axis=1)
    skip = np.stack(skips)
    wanted = kl + 0.7 * (1 - skip).mean(axis=0) + 0.3 * (4 * skip * (1 - skip)).mean(axis=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_decisions_in_training_are_those_of_decoding():
    prompts = np.random.default_rng(3).integers(1, 37, (5, 15)).astype(np.int32)
    params = TARGET.params | {"layer_gates": LAYER_GATES}
    lengths = np.full(5, prompts.shape[1], np.int32)
    state = decoding.prefill(TARGET.model, params, prompts, lengths, 1, np.arange(5), layer_policy=POLICY)
    read = jax.jit(lambda: routed_logits(TARGET.model, params, jnp.asarray(prompts[:, :-1]), POLICY, hard=True))
    np.testing.assert_array_equal(read()[1], ~np.asarray(state.layer_policy)[:, :-1])
    assert len({tuple(row) for row in np.asarray(state.layer_policy)}) > 1


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Stage two, with the middle layer always skipped: the training, its facts, its folder."""
    folder = tmp_path_factory.mktemp("change")
    training = RoutedChangeTraining(TARGET, RoutedChangeShape(rank=3), PLAN, TEXTS, folder / "run", SKIPPING)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trained = training.train(report_every=10, measure_every=30)
    facts = training.export(folder / "out", trained.params, trained.step, folder / "loss.png", dtype="float32")
    return training, facts, folder / "out"


@pytest.mark.slow
def test_the_change_compensates_for_skipped_layers_and_the_layer_gates_stay(changed, tmp_path):
    training, facts, out = changed
    untrained = training.measure(training.initial(), TEXTS.heldout_windows(WINDOW))
    assert facts["heldout"]["kl"] < 0.8 * untrained["kl"] and facts["heldout"]["greedy"] > untrained["greedy"]
    assert facts["heldout"]["skipped_by_layer"] == untrained["skipped_by_layer"] == [0, 1, 0]
    weights = read_auxiliary_weights(out, "float32")
    jax.tree.map(np.testing.assert_array_equal, weights.params["layer_gates"], SKIPPING)
    training.refuse_foreign(out)
    with pytest.raises(ValueError, match="already holds another model"):
        replace(training, layer_gates=LAYER_GATES).refuse_foreign(out)


@pytest.mark.slow
def test_both_stages_decode_by_name(layer_gates, changed):
    for folder, middle_runs in ((layer_gates[0][2], True), (layer_gates[2][2], False), (changed[2], False)):
        found = METHODS["first"]().build(TARGET, folder)
        assert found.layer_policy == RoutedLayers()
        out = decodax.generate(TARGET, [PROMPT], strategy="first", draft=folder, max_new_tokens=9)
        text = jnp.concatenate([PROMPT, out.tokens[0]])[None]
        bias = jnp.array([-9.0, -9.0 if middle_runs else 9.0, -9.0])
        fixed = {"layer_gates": {"weight": jnp.zeros((LAYERS, WIDTH)), "bias": bias}}
        logits, _ = _hard(found.params | fixed, text)
        np.testing.assert_array_equal(out.tokens[0], np.argmax(logits, axis=-1)[0, len(PROMPT) - 1 : -1])
    assert METHODS["first"](threshold=0.25).build(TARGET, changed[2]).layer_policy == RoutedLayers(threshold=0.25)


@jax.jit
def _hard(params, tokens):
    return routed_logits(TARGET.model, params, tokens, RoutedLayers(), hard=True)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="some layer must be left to the layer gates, got 2 first and 1 last"):
        LayerGateTraining(TARGET, RoutedShape(kept_first=2), PLAN, TEXTS, tmp_path)
    few = {"weight": jnp.zeros((2, WIDTH)), "bias": jnp.zeros(2)}
    with pytest.raises(ValueError, match="must hold weight"):
        RoutedChangeTraining(TARGET, RoutedChangeShape(), PLAN, TEXTS, tmp_path, few)
