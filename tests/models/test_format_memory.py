"""A packed weight is read in pieces: never as a whole in float32, beside the parameter itself."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from decodax.models.checkpoints import reading
from decodax.models.checkpoints.name_map import PeriodicSlice, TensorSlice
from tests.checkpoint_parameters import peak_bytes, read_parameters

OUTPUTS, INPUTS, GROUP = 4096, 1024, 64


def words(*shape):
    return np.random.default_rng(3).integers(0, 2**32, shape, dtype=np.uint32).view(np.int32)


def scales(*shape):
    return np.random.default_rng(4).uniform(0.01, 0.02, shape).astype(np.float16)


def nf4():
    state = {"shape": [OUTPUTS, INPUTS], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.5}
    num_blocks = OUTPUTS * INPUTS // 64
    return {
        "weight": np.zeros((OUTPUTS * INPUTS // 2, 1), np.uint8),
        "weight.absmax": np.zeros(num_blocks, np.uint8),
        "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "weight.nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
        "weight.nested_absmax": np.ones(num_blocks // 256, np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def compressed(**weights):
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"all": {"targets": ["Linear"], "weights": {"group_size": GROUP, **weights}}},
    }


GROUPS = INPUTS // GROUP
CASES = {
    "gptq": (
        {
            "qweight": words(INPUTS // 8, OUTPUTS),
            "qzeros": words(GROUPS, OUTPUTS // 8),
            "scales": scales(GROUPS, OUTPUTS),
            "g_idx": np.random.default_rng(5).permutation(np.arange(INPUTS) // GROUP).astype(np.int32),
        },
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
    ),
    "awq": (
        {
            "qweight": words(INPUTS, OUTPUTS // 8),
            "qzeros": words(GROUPS, OUTPUTS // 8),
            "scales": scales(GROUPS, OUTPUTS),
        },
        {"quant_method": "awq", "bits": 4, "group_size": GROUP},
    ),
    "mlx": (
        {
            "weight": words(OUTPUTS, INPUTS // 8).view(np.uint32),
            "scales": scales(OUTPUTS, GROUPS),
            "biases": scales(OUTPUTS, GROUPS),
        },
        {"bits": 4, "group_size": GROUP},
    ),
    "bitsandbytes": (nf4(), {"quant_method": "bitsandbytes"}),
    "compressed-tensors": (
        {
            "weight_packed": words(OUTPUTS, INPUTS // 8),
            "weight_scale": scales(OUTPUTS, GROUPS),
            "weight_zero_point": words(OUTPUTS // 8, GROUPS),
            "weight_shape": np.array([OUTPUTS, INPUTS]),
        },
        compressed(num_bits=4, strategy="group", symmetric=False),
    ),
}


def stored(folder, name):
    pieces, quantization = CASES[name]
    save_file({f"x.{piece}": array for piece, array in pieces.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))


@pytest.mark.parametrize("name", CASES)
def test_a_packed_weight_is_read_in_pieces(tmp_path, name):
    """Besides the parameter's own buffer and its page: some pieces, not the weight as float32 (16 MiB) or as codes."""
    stored(tmp_path, name)
    name_map = (TensorSlice("x.weight", part=PeriodicSlice(2, 1, 2)),)
    peak, buffer = peak_bytes(tmp_path, name_map, (OUTPUTS // 2, INPUTS)), 2 * OUTPUTS * INPUTS + 2**21
    assert buffer <= peak <= buffer + 7 * reading.PIECE_BYTES, (peak - buffer) / reading.PIECE_BYTES


@pytest.mark.parametrize("name", CASES)
def test_pages_of_all_pieces_are_released(tmp_path, name, monkeypatch):
    stored(tmp_path, name)
    released = []
    monkeypatch.setattr(reading, "forget_pages", lambda mappings: released.append(list(mappings)))
    read_parameters(tmp_path, {"w": ((TensorSlice("x.weight"),),)}, {"w": (OUTPUTS, INPUTS)})
    assert len(released) >= 2 and all(len(mappings) == 1 for mappings in released)  # one file holds all pieces
