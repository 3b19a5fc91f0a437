"""Weights under a wrapper's names load with a warning; where names do not agree, the error shows both."""

import doctest
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decodax.models.checkpoints import name_prefix
from decodax.models.checkpoints.conversion import open_source
from decodax.models.checkpoints.name_prefix import TensorNames, find_names
from decodax.models.checkpoints.reading import load_params
from decodax.models.configs.hf_config import load_config
from decodax.models.mtp_head import holds_mtp_head, open_mtp_head
from tests.golden_files import load_golden

# The names in a file of a causal model -> those under a wrapper. The last four wrap the body, and not the head.
WRAPPERS = {
    "language_model.model.": lambda name: f"language_model.{name}",
    "base_model.model.model.": lambda name: f"base_model.model.{name}",
    "_orig_mod.model.": lambda name: f"_orig_mod.{name}",
    "module._orig_mod.model.": lambda name: f"module._orig_mod.{name}",
    "transformer.": lambda name: f"transformer.{name.removeprefix('model.')}",
    "model.language_model.": lambda name: re.sub(r"^model\.", "model.language_model.", name),
    "model.model.": lambda name: re.sub(r"^model\.", "model.model.", name),
    "model._orig_mod.": lambda name: re.sub(r"^model\.", "model._orig_mod.", name),
    "language_model.": lambda name: re.sub(r"^model\.", "language_model.", name),
}


def params_of(folder):
    family, config = load_config(folder)
    return load_params(folder, family, config, dtype=np.dtype(np.float32))


def saved(folder, tensors, golden="llama"):
    shutil.copy(load_golden(golden).folder / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def leaves_of(params):
    return {path: leaf for path, leaf in sorted(_leaves(params))}


def _leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", np.asarray(value)


def test_examples():
    assert doctest.testmod(name_prefix).failed == 0


@pytest.mark.parametrize("golden", ["llama", "llama_tied"])
@pytest.mark.parametrize("body", WRAPPERS)
def test_wrapped_weights_are_the_model(tmp_path, body, golden):
    folder = load_golden(golden).folder
    tensors = {WRAPPERS[body](name): value for name, value in load_file(folder / "model.safetensors").items()}
    with pytest.warns(UserWarning, match=rf"read with {re.escape(body)} in place of model\. and \S*lm_head.w") as said:
        params = params_of(saved(tmp_path, tensors, golden))
    assert len(said) == 1
    wanted = leaves_of(params_of(folder))
    found = leaves_of(params)
    assert found.keys() == wanted.keys() and all(np.array_equal(found[path], wanted[path]) for path in wanted)


def test_a_copy_of_the_head_under_a_wrapper_is_not_left_out(tmp_path):
    tensors = load_file(load_golden("llama_tied").folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder = saved(tmp_path, {f"module.{name}": value for name, value in tensors.items()}, "llama_tied")
    with pytest.warns(UserWarning, match="have the names of something that wraps the model"):
        assert open_source(folder).left_out == ()


@pytest.mark.parametrize("change", [lambda name: name, lambda name: name.removeprefix("model.")])
def test_the_usual_names_give_no_warning(tmp_path, change):
    tensors = load_file(load_golden("llama").folder / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params_of(saved(tmp_path, {change(name): value for name, value in tensors.items()}))


def test_names_that_do_not_agree_are_refused_and_both_are_shown(tmp_path):
    tensors = load_file(load_golden("llama").folder / "model.safetensors")
    half = {name if index % 2 else f"module.{name}": value for index, (name, value) in enumerate(tensors.items())}
    twice = tensors | {f"module.{name}": value for name, value in tensors.items()}
    beside = {f"module.{name}": value for name, value in tensors.items()} | {"module.tower.weight": np.ones(3)}
    for named, lines in (
        (half, ("missing: ", "surplus: ")),
        (twice, ("surplus: module.model.",)),
        (beside, ("surplus: module.tower.weight [3]",)),
    ):
        with pytest.raises(ValueError, match=r"do not fit its config\.json") as caught:
            params_of(saved(tmp_path, named))
        assert all(f"\n  - {line}" in str(caught.value) for line in lines)


def test_a_report_of_many_tensors_shows_both(tmp_path):
    tensors = load_file(load_golden("llama").folder / "model.safetensors")
    foreign = {f"h.{index}.{name}.\x1b[2J": value for index in range(4) for name, value in tensors.items()}
    with pytest.raises(ValueError, match=r"do not fit its config\.json") as caught:
        params_of(saved(tmp_path, foreign))
    lines = str(caught.value).splitlines()
    assert len(lines) < 25 and "\x1b" not in str(caught.value)
    assert sum("missing: model." in line for line in lines) > 5 < sum("surplus: h.0." in line for line in lines)
    assert re.fullmatch(r"  - and \d+ more surplus", lines[-1])


def test_an_mtp_head_under_a_wrapper(tmp_path):
    golden = load_golden("llama").folder.parent / "deepseek_v3_mtp"
    tensors = load_file(golden / "model.safetensors")
    folder = Path(shutil.copytree(golden, tmp_path / "model"))
    save_file({f"language_model.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    family, config = load_config(folder)
    assert holds_mtp_head(folder, family, config)
    opened = open_mtp_head(folder, family, config)
    assert opened.names == TensorNames("language_model.model.", "language_model.")
    assert set(opened.filled) == set(open_mtp_head(golden, family, config).filled)


def test_names_with_thousands_of_dots_take_no_time():
    name = "." * 10**6
    assert find_names([name, f"model{name}", ""], {"model.norm.weight"}) == TensorNames()
