"""Damaged folders of auxiliary weights of every kind are refused by file and field; intact ones are read."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import decodax
from decodax.decoding.auxiliary_check import KINDS
from decodax.decoding.auxiliary_weights import AuxiliaryWeights, find_auxiliary_weights, read_auxiliary_weights
from decodax.decoding.find_draft import find_draft
from decodax.decoding.strategies import METHODS
from decodax.models.checkpoints.model_files import UnreasonableFileError
from decodax.models.checkpoints.weight_formats import read_floats
from decodax.models.load import find_folder

DEMO = find_folder(None)


@pytest.fixture(scope="module")
def lm():
    return decodax.load()


@pytest.fixture
def copied(tmp_path):
    """Makes a copy of the embedded model's auxiliary weights of a kind, with other facts or other weights."""

    def make(kind, change_facts=None, change_weights=None):
        folder = Path(shutil.copytree(DEMO / kind, tmp_path / "part", dirs_exist_ok=True))
        if change_facts is not None:
            facts = json.loads((folder / "auxiliary.json").read_text())
            changed = change_facts(facts)
            (folder / "auxiliary.json").write_text(json.dumps(facts if changed is None else changed))
        if change_weights is not None:
            tensors = read_floats(folder / "auxiliary.safetensors", np.float32)
            save_file(change_weights(tensors), folder / "auxiliary.safetensors")
        return folder

    return make


def refused(lm, kind, folder, words):
    with pytest.raises(ValueError, match=words) as caught:
        find_auxiliary_weights(kind, lm, folder)
    assert "\n" not in str(caught.value) and type(caught.value) in (ValueError, UnreasonableFileError)


def test_every_kind_of_the_embedded_model_is_known(lm):
    folders = {path.parent.name for path in DEMO.glob("*/auxiliary.json")}
    assert set(KINDS) == folders
    for kind in KINDS:
        assert find_auxiliary_weights(kind, lm, None).kind == kind


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_do_not_fit_the_kind_are_refused(lm, copied, kind):
    name = next(iter(read_floats(DEMO / kind / "auxiliary.safetensors", np.float32)))

    def first(change):
        return lambda tensors: tensors | {name: change(tensors[name])}

    without = r"part must (have|hold)|of part must have"
    for change, words in (
        (lambda tensors: {"zzz": tensors[name]}, without),
        (lambda tensors: tensors | {"zzz": tensors[name]}, r"the weight zzz of part must have none of this name"),
        (lambda tensors: {key: value for key, value in tensors.items() if key != name}, without),
        (first(lambda array: array[None]), rf"the weight {name} of part must have shape|{without}"),
        (first(lambda array: array.repeat(5, axis=-1)), r"must have shape .*, got shape"),
        (first(lambda array: array.astype(np.int8)), rf"{name} in .*safetensors must hold floating-point .* got I8"),
        (first(lambda array: np.full_like(array, np.nan)), rf"{name} in .*\.safetensors holds NaN or infinity"),
        (first(lambda array: np.full(array.shape, -np.inf)), rf"{name} in .*\.safetensors holds NaN or infinity"),
    ):
        refused(lm, kind, copied(kind, change_weights=change), words)


def test_weights_that_overflow_in_the_dtype_are_refused(copied):
    folder = copied("ppd", change_weights=lambda tensors: {"embedding": tensors["embedding"] * 0 + 1e30})
    assert read_auxiliary_weights(folder, ml_dtypes.bfloat16).params["embedding"].dtype == ml_dtypes.bfloat16
    with pytest.raises(ValueError, match=r"embedding in .* holds NaN or infinity \(as float16\)"):
        read_auxiliary_weights(folder, np.float16)


@pytest.mark.parametrize("content", ["", "[]", "null", "7", '"x"', "{", '{"a":' * 100_000, "\udcff"])
def test_facts_that_are_not_an_object_are_refused(lm, copied, content):
    folder = copied("ppd")
    (folder / "auxiliary.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(lm, "ppd", folder, r"auxiliary\.json (is no valid JSON|must hold a JSON object|is JSON nested)")


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("ppd", lambda facts: {}, r"auxiliary\.json must say its kind as a text, got None"),
        ("ppd", lambda facts: facts | {"kind": ["ppd"]}, r"auxiliary\.json must say its kind as a text"),
        ("ppd", lambda facts: facts | {"kind": "\x1b[2J"}, r"part holds '\\x1b\[2J'"),
        ("ppd", lambda facts: facts | {"about": 7}, r"about in .*auxiliary\.json must be an object, got 7"),
        ("ppd", lambda facts: facts | {"heldout": []}, r"heldout in .*auxiliary\.json must be an object"),
        ("ppd", lambda facts: facts | {"about": {}}, r"about\.shape of part must be an object"),
        ("kangaroo", lambda facts: {"kind": "kangaroo"}, r"about\.shape of part must be an object"),
        ("kangaroo", lambda facts: facts | {"about": {"shape": {}}}, r"about\.shape\.exit_layer .* got None"),
        ("kangaroo", lambda facts: facts | {"about": {"shape": {"exit_layer": "1"}}}, r"exit_layer of part .* got '1'"),
        ("kangaroo", lambda facts: facts | {"about": {"shape": {"exit_layer": 10**9}}}, r"of part: exit_layer .*10"),
        ("first", lambda facts: facts["about"]["shape"].update(threshold=None), r"threshold of part must be a number"),
        ("first", lambda facts: facts["about"]["shape"].update(threshold=float("nan")), r"threshold of part must be"),
        ("first", lambda facts: facts["about"]["shape"].update(kept_last=-1), r"kept_last of part must be a whole"),
        ("skip_decode", lambda facts: facts["about"]["shape"].update(min_layers=True), r"min_layers of part must be"),
        ("first", lambda facts: facts["about"]["shape"].update(threshold=10**400), r"threshold of part must be"),
        ("skip_decode", lambda facts: facts["about"]["shape"].update(max_layers=[8]), r"max_layers of part must be"),
        ("specee", lambda facts: facts | {"target_layers": "\x1b8"}, r"number of layers is \\x1b8, and"),
        ("medusa", lambda facts: facts | {"target_hidden_size": {}}, r"hidden size is \{\}, and"),
    ],
)
def test_facts_that_a_strategy_cannot_use(lm, copied, kind, change, words):
    refused(lm, kind, copied(kind, change_facts=change), words)


def test_a_strategy_names_the_folder_whose_settings_it_refuses(lm, copied):
    folder = copied("skip_decode", change_facts=lambda facts: facts["about"]["shape"].update(min_layers=9))
    with pytest.raises(ValueError, match=r"^about\.shape of part: layers must be .* min_layers 9, max_layers 8$"):
        METHODS["skip_decode"]().build(lm, folder)


@pytest.mark.parametrize(
    "value",
    [None, 7, [], "0.5", [[]], [["0.5"]], [[0.5], [0.5, 0.5]], [[1.5]], [[float("nan")]], [[10**400]], [[0.5]] * 99],
)
def test_bad_accuracies_are_refused(value):
    made = AuxiliaryWeights("ppd", {}, {"heldout": {"rank_accuracy": value}}, "mine")
    with pytest.raises(ValueError, match=r"heldout\.rank_accuracy of mine must be a list of equally long lists"):
        made.rank_accuracy  # noqa: B018
    with pytest.raises(ValueError, match=r"rank_accuracy, .*, is missing in the auxiliary weights"):
        AuxiliaryWeights("ppd", {}, {}).rank_accuracy  # noqa: B018


def test_weight_names_that_nest_in_one_another_are_refused(copied):
    for names in (("a", "a.b"), ("a.b", "a"), ("a.b.c", "a.b"), (".".join("a" * 99),)):
        folder = copied("ppd", change_weights=lambda tensors, names=names: dict.fromkeys(names, tensors["embedding"]))
        with pytest.raises(
            ValueError, match=r"auxiliary\.safetensors (names a weight|must name weights by at most 16 keys)"
        ):
            read_auxiliary_weights(folder, np.float32)


def test_missing_files_outside_links_and_pipes_are_refused(copied, tmp_path):
    folder = copied("ppd")
    for name in ("auxiliary.json", "auxiliary.safetensors"):
        kept = tmp_path / name
        (folder / name).rename(kept)
        with pytest.raises(FileNotFoundError, match=rf"holds no {name}: give the folder that `decodax train` wrote"):
            read_auxiliary_weights(folder, np.float32)
        (folder / name).symlink_to(kept)
        with pytest.raises(ValueError, match=rf"{name} is a link to .* outside the model's folder"):
            read_auxiliary_weights(folder, np.float32)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=rf"{name} must be a regular file"):
            read_auxiliary_weights(folder, np.float32)
        (folder / name).unlink()
        kept.rename(folder / name)
    assert read_auxiliary_weights(folder, np.float32).kind == "ppd"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", r"draft\.json must hold a JSON object"),
        ('{"heldout": 7}', r"heldout in .*draft\.json must be an object, got 7"),
        ('{"heldout": {"greedy": "0.5"}}', r"heldout\.greedy in .*draft\.json must be a number in 0\.\.1, got '0\.5'"),
        ('{"heldout": {"rank_acceptance": 0.5}}', r"heldout\.rank_acceptance in .*draft\.json must be a list of"),
        ('{"heldout": {"rank_acceptance": [2]}}', r"heldout\.rank_acceptance in .*draft\.json must be a list of"),
    ],
)
def test_bad_facts_of_a_draft_are_refused(lm, tmp_path, content, words):
    folder = Path(shutil.copytree(DEMO / "draft", tmp_path / "draft"))
    (folder / "draft.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        find_draft("draft_model", lm, folder)
