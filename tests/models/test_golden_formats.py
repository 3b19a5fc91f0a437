"""Models in every weight format load with the numbers that the format's own library computes, bit by bit.

The folders in tests/golden_formats are of scripts/make_golden_formats.py.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

import decodax
from decodax.models.checkpoints.formats import FORMATS
from decodax.models.checkpoints.formats.contract import PackedTensor
from decodax.models.checkpoints.reading import open_params
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.checkpoints.write_orbax import from_hf
from decodax.models.configs.hf_config import load_config

GOLDEN = Path(__file__).parent.parent / "golden_formats"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())


def numbers_of(name):
    with np.load(GOLDEN / name / "numbers.npz") as file:
        return dict(file)


def expected(name):
    """Every tensor of the model, plain or packed, as float32."""
    packed = numbers_of(name)
    with safe_open(GOLDEN / name / "model.safetensors", framework="numpy") as file:
        names = [tensor for tensor in file.keys() if tensor.endswith(".weight") and tensor not in packed]  # noqa: SIM118
        return packed | {tensor: file.get_tensor(tensor).astype(np.float32) for tensor in names}


def by_name(folder, params):
    """The parameters under their names in safetensors."""
    family, config = load_config(folder)
    leaves = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return {name: np.asarray(leaves[path]) for name, path in family.tensor_names(config).items()}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name].view(np.uint32), value.view(np.uint32), err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_formats_own_library(name):
    folder = GOLDEN / name
    assert len(numbers_of(name)) >= 4
    assert_same_bits(by_name(folder, decodax.load(folder, dtype="float32").params), expected(name))


def test_every_format_has_a_case_here_or_in_the_golden_models():
    quantizations = [json.loads((GOLDEN / name / "config.json").read_text()) for name in CASES]
    methods = {config.get("quantization_config", {"quant_method": "mlx"})["quant_method"] for config in quantizations}
    assert methods | {"fp8", "mxfp4"} == set(FORMATS)


@pytest.mark.parametrize("name", CASES)
def test_parts_give_the_same_numbers_for_any_rows(name):
    """Codes, scales and zero points of some rows are those of all rows, in any order and with any step."""
    folder, wanted = GOLDEN / name, numbers_of(name)
    opened = open_params(folder, *load_config(folder))
    packed = {key: tensor for key, tensor in opened.stored.items() if isinstance(tensor, PackedTensor)}
    assert packed.keys() == wanted.keys()
    for key, tensor in packed.items():
        assert tensor.mappings and tensor.shape == wanted[key].shape
        for index in (slice(3, 11, 2), slice(13, None), np.array([7, 2, 2, 15])):
            parts = tensor.parts(index)
            assert parts.codes.dtype.itemsize == 1 and parts.codes.shape[1] == tensor.shape[1]
            np.testing.assert_array_equal(parts.numbers(), wanted[key][index])
            np.testing.assert_array_equal(tensor.rows(index), wanted[key][index])


@pytest.mark.parametrize("name", ["gptq", "mlx_mixed", "ct_nvfp4"])
def test_conversion_writes_plain_weights(name, tmp_path):
    for write in (to_hf, from_hf):
        target = tmp_path / write.__name__
        write(GOLDEN / name, target)
        assert not {"quantization_config", "quantization"} & json.loads((target / "config.json").read_text()).keys()
        assert_same_bits(by_name(target, decodax.load(target, dtype="float32").params), expected(name))
