"""Packed numbers equal plain loops where golden files are too small: several levels, odd sizes, orderings."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decodax.models.checkpoints import reading
from decodax.models.checkpoints.name_map import single_tensor
from tests.checkpoint_parameters import read_parameters


def read(folder, pieces, quantization, shape):
    save_file(
        {f"x.{name}": np.ascontiguousarray(piece) for name, piece in pieces.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return read_parameters(folder, {"w": single_tensor("x.weight")}, {"w": shape}, elsewhere=None)["w"]


@pytest.mark.parametrize("piece_bytes", [1, 100, 2**20])
@pytest.mark.parametrize(
    ("shape", "storage"),
    [((5, 7), np.uint8), ((11, 12), np.uint8), ((3, 5, 14), np.uint8), ((13, 3), np.uint8), ((14, 12), np.float32)],
)
def test_doubly_quantised_blocks_of_the_flattened_tensor(tmp_path, monkeypatch, piece_bytes, shape, storage):
    """Blocks of 6 numbers, which rows of 12 hold whole and other rows do not; five scales share one of their own."""
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    rng, block, nested_block, count = np.random.default_rng(2), 6, 5, int(np.prod(shape))
    num_blocks = -(-count // block)
    codes, scale_codes = rng.integers(0, 16, count + count % 2), rng.integers(0, 256, num_blocks)
    values, nested_values = (rng.uniform(-1, 1, size).astype(np.float32) for size in (16, 256))
    nested = rng.uniform(0.5, 2, -(-num_blocks // nested_block)).astype(np.float32)
    octets = (codes[::2] * 16 + codes[1::2]).astype(np.uint8).view(storage)  # any type may hold the bytes
    state = {"shape": shape, "blocksize": block, "nested_blocksize": nested_block, "nested_offset": 0.375}
    pieces = {
        "weight": octets[:, None],
        "weight.absmax": scale_codes.astype(np.uint8),
        "weight.quant_map": values,
        "weight.nested_quant_map": nested_values,
        "weight.nested_absmax": nested,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    expected = np.empty(count, np.float32)
    for i in range(count):
        scale = np.float32(nested_values[scale_codes[i // block]] * nested[i // block // nested_block])
        expected[i] = values[codes[i]] * np.float32(scale + np.float32(0.375))
    found = read(tmp_path, pieces, {"quant_method": "bitsandbytes"}, shape)
    np.testing.assert_array_equal(found, expected.reshape(shape))


def test_groups_of_inputs_that_are_not_consecutive(tmp_path):
    """compressed-tensors with activation ordering: the group of each input is stored."""
    rng, shape, groups = np.random.default_rng(3), (7, 24), 3
    codes, zeros = rng.integers(0, 256, shape), rng.integers(0, 256, (8, groups))
    scales = rng.uniform(0.5, 2, (7, groups)).astype(np.float32)
    group_of = rng.permutation(np.arange(24) % groups)
    pieces = {
        "weight_packed": codes.astype(np.uint8).view(np.int32),
        "weight_scale": scales,
        "weight_zero_point": zeros.astype(np.uint8).T.copy().view(np.int32).T,
        "weight_g_idx": group_of.astype(np.int32),
        "weight_shape": np.array(shape),
    }
    weights = {"num_bits": 8, "symmetric": False, "strategy": "group", "group_size": 8, "actorder": "group"}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
    expected = np.empty(shape, np.float32)
    for o, i in np.ndindex(shape):
        expected[o, i] = np.float32(codes[o, i] - zeros[o, group_of[i]]) * scales[o, group_of[i]]
    np.testing.assert_array_equal(read(tmp_path, pieces, config, shape), expected)
    del pieces["weight_g_idx"]
    with pytest.raises(ValueError, match=r"missing: x.weight_g_idx \[24\], the group of each input of x.weight"):
        read(tmp_path, pieces, config, shape)
    pieces["weight_g_idx"] = group_of + 1
    with pytest.raises(ValueError, match=r"misshapen: x.weight_g_idx must hold groups from 0 to 2, got 1 to 3"):
        read(tmp_path, pieces, config, shape)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stacked_weights_of_mlx(tmp_path, bits):
    """Experts in one tensor [experts, outputs, inputs]: scales and offsets have its first axes."""
    rng, shape, per_word = np.random.default_rng(5), (3, 5, 64), 32 // bits
    codes = rng.integers(0, 2**bits, shape).astype(np.uint64)
    words = np.zeros((3, 5, 64 // per_word), np.uint64)
    for place in range(per_word):
        words |= codes[..., place::per_word] << np.uint64(bits * place)
    scales, biases = (rng.uniform(-1, 1, (3, 5, 2)).astype(np.float32) for _ in range(2))
    expected = np.empty(shape, np.float32)
    for e, o, i in np.ndindex(shape):
        expected[e, o, i] = np.float32(np.float32(codes[e, o, i]) * scales[e, o, i // 32]) + biases[e, o, i // 32]
    pieces = {"weight": words.astype(np.uint32), "scales": scales, "biases": biases}
    found = read(tmp_path, pieces, {"bits": bits, "group_size": 32}, shape)
    np.testing.assert_array_equal(found, expected)
    assert load_file(tmp_path / "model.safetensors")["x.weight"].shape == (3, 5, 64 // per_word)
