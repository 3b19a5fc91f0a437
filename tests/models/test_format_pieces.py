"""Packed weights whose pieces do not fit each other or the config are named in one line, with what was expected."""

import json
import re
import shutil
from mmap import mmap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decodax.models.checkpoints.formats import FORMATS
from decodax.models.checkpoints.formats.contract import Unreadable
from decodax.models.checkpoints.formats.view import quantization_of, readable
from decodax.models.checkpoints.reading import load_params
from decodax.models.checkpoints.safetensors_files import RawTensor
from decodax.models.configs.hf_config import load_config

GOLDEN = Path(__file__).parent.parent / "golden_formats"
DOWN = "model.layers.0.mlp.down_proj"
NAMES = {"quantization", "quantization_config"}


def load(folder, name, tensors, changed=None):
    """Loads these tensors with the config of a golden case, some of whose quantisation's fields are changed."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    (key,) = NAMES & config.keys()
    if changed is not None:
        config[key] |= changed
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return load_params(folder, *load_config(folder), dtype=np.dtype(np.float32))


def problems(folder, name, tensors, changed=None):
    with pytest.raises(ValueError, match=r"do not fit its config.json") as caught:
        load(folder, name, tensors, changed)
    return [line.removeprefix("  - ") for line in str(caught.value).split("\n")[1:]]


def without_last(axis):
    return lambda array: np.ascontiguousarray(np.delete(array, -1, axis))


def as_kind(kind):
    return lambda array: array.astype(kind)


def filled(place, value):
    def change(array):
        array = array.copy()
        array.flat[place] = value
        return array

    return change


DAMAGES = [
    ("gptq", "qzeros", None, "missing: {}.qzeros [3, 4], the zero points of {}.weight [32, 48]"),
    ("gptq", "scales", None, "missing: {}.scales [3, 32], one scale for each group of {}.weight [32, 48]"),
    ("gptq", "scales", without_last(0), "misshapen: {}.scales [2, 32], expected [3, 32], one scale for each group"),
    ("gptq", "scales", as_kind(np.int32), "unknown kind of number: {}.scales is I32, expected one of ['BF16',"),
    ("gptq", "qzeros", without_last(1), "misshapen: {}.qzeros [3, 3], expected [3, 4], the zero points"),
    ("gptq", "qweight", as_kind(np.int16), "unknown kind of number: {}.qweight is I16, expected one of ['I32', 'U32']"),
    ("gptq", "qweight", lambda array: array[0], "misshapen: {}.qweight [32], expected [inputs / 8, outputs]"),
    ("gptq", "qweight", without_last(1), "misshapen: {}.qweight [6, 31], expected outputs that are a multiple of 8"),
    ("gptq", "qweight", without_last(0), "misshapen: {}.weight has 40 inputs, which quantization_config.group_size"),
    ("gptq_act_order", "g_idx", filled(5, 3), "misshapen: {}.g_idx must hold groups from 0 to 2, got 0 to 3"),
    ("gptq_act_order", "g_idx", filled(5, -1), "misshapen: {}.g_idx must hold groups from 0 to 2, got -1 to 2"),
    ("gptq_act_order", "g_idx", without_last(0), "misshapen: {}.g_idx [47], expected [48], the group of each input"),
    ("gptq_act_order", "g_idx", None, "missing: {}.g_idx [48], the group of each input"),  # desc_act
    ("awq", "qzeros", None, "missing: {}.qzeros [3, 4], the zero points of {}.weight [32, 48]"),
    ("awq", "scales", without_last(1), "misshapen: {}.scales [3, 31], expected [3, 32]"),
    ("awq", "qweight", without_last(0), "misshapen: {}.weight has 47 inputs, which quantization_config.group_size"),
    ("mlx_mixed", "biases", None, "missing: {}.biases [64, 2], one bias for each 64 inputs (group_size) of {}.weight"),
    ("mlx_mixed", "scales", without_last(1), "misshapen: {}.scales [64, 1], expected [64, 2], one scale for each 64"),
    ("mlx_mixed", "scales", as_kind(np.uint8), "unknown kind of number: {}.scales is U8, expected one of ['BF16',"),
    ("mlx_mixed", "weight", without_last(1), "misshapen: {}.weight has 124 inputs of 8 bits, which quantization's g"),
    ("mlx_mixed", "weight", lambda array: array[0], "misshapen: {}.weight [32], expected [.., outputs, inputs * bits"),
    ("bnb_nf4", "weight.absmax", None, "missing: {}.weight.absmax [96], one scale for each 64 numbers of {}.weight"),
    ("bnb_nf4", "weight.absmax", without_last(0), "misshapen: {}.weight.absmax [95], expected [96], one scale"),
    ("bnb_nf4", "weight.nested_absmax", None, "unknown kind of number: {}.weight.absmax is U8, expected one of ['F3"),
    ("bnb_nf4", "weight.nested_quant_map", without_last(0), "misshapen: {}.weight.nested_quant_map [255], expected"),
    ("bnb_nf4", "weight.quant_map", None, "missing: {}.weight.quant_map [16], the numbers of the codes"),
    ("bnb_nf4", "weight", without_last(0), "misshapen: {}.weight has 3,071 bytes, expected 3,072 for the shape [64,"),
    ("bnb_nf4", "weight.quant_state.bitsandbytes__nf4", None, "missing: {}.weight.quant_state.bitsandbytes__nf4, th"),
    ("bnb_nf4", "weight.quant_state.bitsandbytes__nf4", filled(0, 0), "misshapen: {}.weight.quant_state.bitsandbyte"),
    ("bnb_int8", "SCB", without_last(0), "misshapen: {}.SCB [31], expected [32], one scale for each row of {}.weight"),
    ("bnb_int8", "weight", lambda array: array[0], "misshapen: {}.weight [48], expected [outputs, inputs]"),
    ("ct_int4_group", "weight_scale", None, "missing: {}.weight_scale, one scale for each group of {}.weight [32, 48]"),
    ("ct_int4_group", "weight_scale", without_last(1), "misshapen: {}.weight_scale [32, 2], expected [32, 3], one s"),
    ("ct_int4_group", "weight_shape", None, "missing: {}.weight_shape [2], the shape of {}.weight"),
    ("ct_int4_group", "weight_shape", filled(1, 49), "misshapen: {}.weight_packed [32, 6] does not hold [32, 49] (w"),
    ("ct_int4_group", "weight_shape", filled(1, 47), "misshapen: {}.weight has 47 inputs, which group_size = 16 of"),
    ("ct_int4_group", "weight_shape", filled(0, -1), "misshapen: {}.weight_packed [32, 6] does not hold [-1, 48]"),
    ("ct_int4_asymmetric", "weight_zero_point", None, "missing: {}.weight_zero_point [4, 3], one zero point for each"),
    ("ct_int4_asymmetric", "weight_zero_point", without_last(0), "misshapen: {}.weight_zero_point [3, 3], expected"),
    ("ct_int8_group", "weight_zero_point", as_kind(np.int16), "unknown kind of number: {}.weight_zero_point is I16,"),
    ("ct_int8_channel", "weight_scale", without_last(0), "misshapen: {}.weight_scale [31, 1], expected [32, 1] or ["),
]  # fmt: skip


@pytest.mark.parametrize(("name", "piece", "change", "line"), DAMAGES)
def test_a_piece_that_does_not_fit_is_named(tmp_path, name, piece, change, line):
    tensors = load_file(GOLDEN / name / "model.safetensors")
    full = f"{DOWN}.{piece}"
    original = tensors.pop(full)
    if change is not None:
        tensors[full] = np.ascontiguousarray(change(original))
    assert [found[: len(line.format(DOWN, DOWN))] for found in problems(tmp_path, name, tensors)] == [
        line.format(DOWN, DOWN)
    ]


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("gptq", "gptq"),
        ("awq", "awq or gptq"),
        ("mlx_mixed", "mlx"),
        ("bnb_fp4", "bitsandbytes"),
        ("bnb_int8", "bitsandbytes"),
        ("ct_int4_group", "compressed-tensors"),
        ("ct_int8_channel", "compressed-tensors"),
    ],
)
def test_packed_weights_without_a_config_and_the_other_way_round(tmp_path, name, method):
    tensors = load_file(GOLDEN / name / "model.safetensors")
    config = json.loads((GOLDEN / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in NAMES}))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        load_params(tmp_path, *load_config(tmp_path), dtype=np.dtype(np.float32))
    with np.load(GOLDEN / name / "numbers.npz") as file:
        numbers = dict(file)
    lines = [line for line in str(caught.value).split("\n") if "not in config.json" in line]
    said = f"is stored as {method}, but there is no quantization_config with quant_method {method}; copy it from where"
    assert len(lines) == len(numbers) and all(said in line for line in lines)
    assert "surplus" not in str(caught.value)  # the pieces belong to what is named

    plain = {key: value for key, value in tensors.items() if value.dtype == np.float16 and key.endswith(".weight")}
    (line,) = problems(tmp_path, name, plain | numbers)
    assert re.fullmatch(r"quantization_config in config.json says .*, but no tensor is stored so: remove it .*", line)


@pytest.mark.parametrize("kind", [np.float64, np.float16])  # the first and the last of the file
def test_plain_and_packed_at_once(tmp_path, kind):
    tensors = load_file(GOLDEN / "gptq" / "model.safetensors")
    tensors[f"{DOWN}.weight"] = np.ones((32, 48), kind)
    (line,) = problems(tmp_path, "gptq", tensors)
    assert line.startswith(f"surplus: {DOWN}.weight is stored as it is and, as {DOWN}.qweight, packed: keep one")


def test_codes_that_are_stored_twice(tmp_path):
    tensors = load_file(GOLDEN / "ct_int4_group" / "model.safetensors")
    for kind in (np.int8, np.int64):  # the last and the first of the file
        tensors[f"{DOWN}.weight"] = np.ones((32, 48), kind)
        (line,) = problems(tmp_path, "ct_int4_group", tensors)
        assert line.startswith(f"surplus: {DOWN}.weight is stored") and line.endswith("keep one of the two")
    weights = {"num_bits": 8, "strategy": "channel"}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
    stored = {"x.weight": RawTensor("x", "I8", (3, 8), np.zeros(24, np.uint8), mmap(-1, 1))}
    stored["x.weight_packed"] = RawTensor("x", "I32", (3, 2), np.zeros(24, np.uint8), mmap(-1, 1))
    (entry,) = readable(stored, quantization_of({"quantization_config": config})).values()
    assert isinstance(entry, Unreadable) and entry.problem.startswith("surplus: x.weight is stored twice")


def test_pieces_of_nvfp4_without_a_config_are_one_tensor(tmp_path):
    config = json.loads((GOLDEN / "ct_nvfp4" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "ct_nvfp4" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError) as caught:
        load_params(tmp_path, *load_config(tmp_path), dtype=np.dtype(np.float32))
    assert str(caught.value).count("is stored as compressed-tensors") == 6 and "surplus" not in str(caught.value)
    scale = np.ones((3, 5), ml_dtypes.float8_e4m3fn)
    stored = {"x.weight_scale": RawTensor("x", "F8_E4M3", (3, 5), scale.view(np.uint8).reshape(-1), mmap(-1, 1))}
    stored["x.weight_packed"] = RawTensor("x", "U8", (3, 40), np.zeros(120, np.uint8), mmap(-1, 1))
    assert list(readable(stored, None)) == ["x.weight"]  # whatever their order


def test_biases_of_zeros_are_passed_over(tmp_path):
    tensors = load_file(GOLDEN / "gptq" / "model.safetensors")
    load(tmp_path, "gptq", tensors | {f"{DOWN}.bias": np.zeros(32, np.float16)})
    assert problems(tmp_path, "gptq", tensors | {f"{DOWN}.bias": np.eye(1, 32, 31)[0]}) == [
        f"surplus: {DOWN}.bias [32]"
    ]
    norm = {"model.norm.bias": np.zeros(32, np.float16)}  # of no packed weight
    assert problems(tmp_path, "gptq", tensors | norm) == ["surplus: model.norm.bias [32]"]


def test_modules_that_the_config_leaves_plain(tmp_path):
    tensors = load_file(GOLDEN / "mlx_mixed" / "model.safetensors")
    assert problems(tmp_path, "mlx_mixed", tensors, {DOWN: False}) == [
        f"not in config.json: {DOWN}.weight is packed, but quantization has {DOWN}: false"
    ]
    tensors = load_file(GOLDEN / "ct_int4_group" / "model.safetensors")
    for ignore in (["re:.*down_proj"], [DOWN], ["re:model.layers.0.mlp.d"]):
        (line,) = problems(tmp_path, "ct_int4_group", tensors, {"ignore": ignore})
        assert line.startswith(f"not in config.json: {DOWN}.weight is stored as compressed-tensors, but no group of")
    load(tmp_path, "ct_int4_group", tensors, {"ignore": ["re:down_proj"]})  # patterns start where names start


def test_groups_of_a_config_have_their_own_schemes(tmp_path):
    """down_proj is read by the first group that names it, everything else by the second."""
    tensors = load_file(GOLDEN / "ct_int4_group" / "model.safetensors")
    weights = {"num_bits": 4, "strategy": "group", "group_size": 16}
    halved = {"targets": ["re:.*down_proj$"], "weights": weights | {"group_size": 24}}
    groups = {"group_0": halved, "group_1": {"targets": ["Linear"], "weights": weights}}
    scale = tensors[f"{DOWN}.weight_scale"]
    tensors[f"{DOWN}.weight_scale"] = np.ascontiguousarray(scale[:, :2])
    load(tmp_path, "ct_int4_group", tensors, {"config_groups": groups})
    tensors[f"{DOWN}.weight_scale"] = scale
    (line,) = problems(tmp_path, "ct_int4_group", tensors, {"config_groups": groups})
    assert line.startswith(f"misshapen: {DOWN}.weight_scale [32, 3], expected [32, 2]")


def test_what_no_model_needs_may_be_unreadable(tmp_path):
    """Of a tensor that fills nothing, only that is said."""
    tensors = load_file(GOLDEN / "gptq" / "model.safetensors")
    tensors["more.qweight"] = np.ones((3, 5), np.int32)
    assert problems(tmp_path, "gptq", tensors) == ["surplus: more.weight [3, 5]"]
    tensors = load_file(GOLDEN / "ct_int8_channel" / "model.safetensors")
    tensors["more.weight"] = np.ones((3, 5), ml_dtypes.float8_e4m3fn)
    assert problems(tmp_path, "ct_int8_channel", tensors) == ["surplus: more.weight [3, 5]"]


def test_the_formats_are_those_of_the_folder():
    folder = Path(__file__).parents[2] / "models" / "checkpoints" / "formats"
    shared = {"__init__", "contract", "fields", "unpacking", "view", "compressed_tensors_config"}
    files = {file.stem for file in folder.glob("*.py")} - shared
    assert files == {name.replace("-", "_") for name in FORMATS}
