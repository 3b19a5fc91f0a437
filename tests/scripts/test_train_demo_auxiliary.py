"""The script that made the shipped auxiliary weights, on a tiny target; and these weights with the embedded model."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import decodax
from decodax.decoding.auxiliary_weights import find_auxiliary_weights, read_auxiliary_weights
from decodax.decoding.strategies import METHODS as STRATEGIES
from decodax.decoding.training.prompt_tokens import PromptTokensShape, PromptTokensTraining
from decodax.decoding.training.texts import Texts
from decodax.models.load import LanguageModel
from decodax.scripts import train_demo_auxiliary
from decodax.scripts.train_demo_auxiliary import KINDS, maker, own_text, training_texts
from tests.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_may_promote")]
SHIPPED = sorted({*KINDS} - {*train_demo_auxiliary.FOLDERS})


@pytest.fixture(scope="module")
def target():
    model, params = tiny_model()
    return LanguageModel(model, model.config, params, None, Path("tiny"), (0,))


def documents(count):
    return [np.random.default_rng(i).integers(1, 37, size=60).astype(np.int32) for i in range(count)]


def test_own_text_is_generated_once_and_split_from_the_calibration_text(target, tmp_path, monkeypatch):
    monkeypatch.setattr(train_demo_auxiliary, "OWN_DOCUMENTS", 4)
    monkeypatch.setattr(train_demo_auxiliary, "CALIBRATION_DOCUMENTS", 2)
    given = Texts(documents(3), documents(1), rotating=documents(5)[3:])
    monkeypatch.setattr(train_demo_auxiliary, "demo_texts", lambda target: given)
    texts = training_texts(target, tmp_path)
    assert (len(texts.train), len(texts.calibration), len(texts.rotating)) == (6, 2, 5)
    monkeypatch.setattr(train_demo_auxiliary, "self_distilled", lambda *_, **__: pytest.fail("written again"))
    again = own_text(target, [], tmp_path)
    np.testing.assert_array_equal(np.concatenate(again[1:4]), np.concatenate(texts.train[:3]))
    np.testing.assert_array_equal(again[0], texts.calibration[0])
    assert all(
        any(np.array_equal(ids[:32], seed[i : i + 32]) for seed in documents(5) for i in range(29)) for ids in again
    )


def test_the_script_trains_writes_and_resumes(target, tmp_path, monkeypatch, capsys):
    ids = documents(4)
    monkeypatch.setattr(train_demo_auxiliary, "load", lambda dtype: target)
    monkeypatch.setattr(
        train_demo_auxiliary, "training_texts", lambda target, runs: Texts(ids[:3], ids[3:], calibration=ids[3:])
    )
    plan = replace(train_demo_auxiliary.PLAN, window_tokens=14, short_tokens=14)
    monkeypatch.setattr(train_demo_auxiliary, "PLAN", plan)
    monkeypatch.setitem(KINDS, "ppd", maker(PromptTokensTraining, PromptTokensShape(2), peak=0.1))
    folders = ["ppd", "--runs", str(tmp_path), "--out", str(tmp_path / "out"), "--image", str(tmp_path / "loss.png")]
    for steps in (2, 3):
        train_demo_auxiliary.main([*folders, "--steps", str(steps)])
        facts = json.loads(capsys.readouterr().out)
        assert facts["trained_tokens"] == steps * 14
        found = read_auxiliary_weights(tmp_path / "out", "float32")
        assert found.params["embedding"].shape == (2, 1, target.config.hidden_size)
        assert found.rank_accuracy == facts["calibration"]["rank_accuracy"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", SHIPPED)
def test_shipped_auxiliary_weights_fit_the_embedded_model(kind):
    lm = decodax.load(dtype="float32")
    found = find_auxiliary_weights(kind, lm, None)
    assert kind in STRATEGIES and found.facts["heldout"] and found.facts["calibration"]
    assert found.facts["num_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(trained_last(found)))


def trained_last(weights):
    """The weights trained by the last run: all, except the layer gates from which the LoRA adapter starts."""
    return {name: leaf for name, leaf in weights.params.items() if (weights.kind, name) != ("first", "layer_gates")}


def test_the_weights_of_routed_layers_are_layer_gates_and_a_change_of_every_matrix():
    lm = decodax.load(dtype="float32")
    found, (layers, width) = find_auxiliary_weights("first", lm, None), (lm.config.num_layers, lm.config.hidden_size)
    assert set(found.params) == {"layer_gates", "low_rank"}
    assert {name: leaf.shape for name, leaf in found.params["layer_gates"].items()} == {
        "weight": (layers, width),
        "bias": (layers,),
    }
    matrices = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params)
        if path[0].key.startswith("blocks_") and leaf.ndim == 2
    ]
    change = sum(found.shape["rank"] * sum(matrix.shape) for matrix in matrices)
    assert found.facts["num_parameters"] == change
    assert sum(leaf.size for leaf in jax.tree.leaves(found.params)) == change + layers * (width + 1)


def test_shipped_auxiliary_weights_are_a_few_megabytes_and_load_the_same():
    folder = train_demo_auxiliary.DEMO
    assert sum(file.stat().st_size for kind in SHIPPED for file in (folder / kind).iterdir()) < 5e6
    facts = [json.loads((folder / kind / "auxiliary.json").read_text()) for kind in SHIPPED]
    assert len({one["trained_tokens"] for one in facts}) == 1
    assert len({one["about"]["text"] for one in facts}) == 1
