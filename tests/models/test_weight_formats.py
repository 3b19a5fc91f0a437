"""FP8 with block scales and mxfp4 equal plain loops in float64; tensors that do not fit are named."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from decodax.models.checkpoints import reading
from decodax.models.checkpoints.name_map import PeriodicSlice, TensorSlice, gated_experts, single_tensor, stack
from decodax.models.checkpoints.reading import NonFiniteWeightWarning
from decodax.models.configs.hf_config import read_config
from tests.checkpoint_parameters import peak_bytes, read_parameters

BLOCK = (3, 5)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def fp8_value(byte):
    """OCP 8-bit floating point, E4M3: no infinity, and one NaN."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return np.nan
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if byte & 128 else magnitude


def fp8_tensor(codes, scales, block=BLOCK):
    full = np.empty(codes.shape)
    for *lead, i, j in np.ndindex(codes.shape):
        full[(*lead, i, j)] = fp8_value(int(codes[(*lead, i, j)])) * float(
            scales[(*lead, i // block[0], j // block[1])]
        )
    return full


def fp4_value(code):
    """OCP Microscaling, E2M1."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2)
    return -magnitude if code & 8 else magnitude


def mxfp4_tensor(blocks, scales):
    *lead, groups, _ = blocks.shape
    full = np.empty((*lead, groups * 32))
    for *index, group, i in np.ndindex(blocks.shape):
        byte, scale = int(blocks[(*index, group, i)]), 2.0 ** (int(scales[(*index, group)]) - 127)
        full[(*index, 32 * group + 2 * i)] = fp4_value(byte & 15) * scale
        full[(*index, 32 * group + 2 * i + 1)] = fp4_value(byte >> 4) * scale
    return full


def fp8_codes(rng, shape):
    """All finite codes."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    return np.where(codes & 127 == 127, 0x3C, codes).astype(np.uint8)


def fp8_pair(rng, name, shape, kind=np.float32, block=BLOCK):
    """Stored codes and scales by name, and the numbers they encode."""
    codes = fp8_codes(rng, shape)
    counts = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    scales = rng.uniform(0.001, 2, counts)
    scales = (2.0 ** np.floor(np.log2(scales)) if kind is ml_dtypes.float8_e8m0fnu else scales).astype(kind)
    stored = {name: codes.view(ml_dtypes.float8_e4m3fn), f"{name}_scale_inv": scales}
    return stored, fp8_tensor(codes, scales.astype(np.float64), block)


def mxfp4_pair(rng, name, rows, groups):
    """The scales reach to both ends of what float32 holds: 0 is 2^-127, and 252 x 6 is below its largest."""
    blocks = rng.integers(0, 256, (*rows, groups, 16)).astype(np.uint8)
    scales = rng.integers(0, 253, (*rows, groups)).astype(np.uint8)
    scales.flat[:2] = 0, 252
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, mxfp4_tensor(blocks, scales)


def stored_in(folder, tensors, quantization):
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))


def as_float32(full):
    """The exact result of one product in float32: in float64 it is exact, 4 significant bits times 24."""
    return full.astype(np.float32)


def test_the_codes_of_the_loops_are_those_of_ml_dtypes():
    codes = np.arange(256, dtype=np.uint8)
    fp8 = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal([fp8_value(code) for code in range(256)], fp8)
    fp4 = codes[:16].view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    np.testing.assert_array_equal([fp4_value(code) for code in range(16)], fp4)


@pytest.mark.parametrize("piece_bytes", [1, 200, 2**20])
def test_fp8_with_scales_of_blocks(tmp_path, monkeypatch, piece_bytes):
    """Sizes that are no multiples of the block, scales of several dtypes, slices, stacks, and plain weights beside."""
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    rng = np.random.default_rng(2)
    tensors, full = {}, {}
    shapes = {"even": (6, 10), "odd": (7, 11), "small": (2, 3), "stacked": (3, 14, 11), "heads": (3 * 5, 7)}
    for name, shape in shapes.items():
        kind = {"odd": ml_dtypes.bfloat16, "small": ml_dtypes.float8_e8m0fnu}.get(name, np.float32)
        pair, full[name] = fp8_pair(rng, f"{name}.weight", shape, kind)
        tensors |= pair
    for e in range(3):
        pair, full[f"expert_{e}"] = fp8_pair(rng, f"expert.{e}.weight", (7, 11))
        tensors |= pair
    tensors["norm"] = rng.standard_normal(4).astype(ml_dtypes.bfloat16)
    stored_in(tmp_path, tensors, FP8)
    name_maps = {name: single_tensor(f"{name}.weight") for name in ("even", "odd", "small")} | {
        "norm": single_tensor("norm")
    }
    name_maps["up"] = ((TensorSlice("stacked.weight", part=PeriodicSlice(14, 7, 14), axis=1),),)
    name_maps["value"] = ((TensorSlice("heads.weight", part=PeriodicSlice(5, 2, 5)),),)
    name_maps["turned"] = ((TensorSlice("odd.weight", transposed=True),),)
    name_maps["experts"] = (stack("expert.{}.weight", 3),)
    expected = {name: full[name] for name in ("even", "odd", "small")} | {
        "norm": tensors["norm"].astype(np.float64),
        "up": full["stacked"][:, 7:],
        "value": np.concatenate([full["heads"][5 * n + 2 : 5 * n + 5] for n in range(3)]),
        "turned": full["odd"].T,
        "experts": np.stack([full[f"expert_{e}"] for e in range(3)]),
    }
    shapes = {name: value.shape for name, value in expected.items()}
    params = read_parameters(tmp_path, name_maps, shapes, elsewhere=None)
    jax.tree.map(np.testing.assert_array_equal, params, {name: as_float32(value) for name, value in expected.items()})
    rounded = read_parameters(tmp_path, name_maps, shapes, dtype=np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(rounded["odd"], as_float32(full["odd"]).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("piece_bytes", [1, 1000, 2**20])
def test_mxfp4_and_the_plain_form_of_the_same_experts(tmp_path, monkeypatch, piece_bytes):
    """gpt-oss: packed [E, 2F, D] in groups of 32, plain [E, D, 2F]; gates in the even places, ups in the odd ones."""
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    rng = np.random.default_rng(3)
    experts, width, hidden = 3, 32, 64
    wide, wide_full = mxfp4_pair(rng, "gate_up_proj", (experts, 2 * width), hidden // 32)
    down, down_full = mxfp4_pair(rng, "down_proj", (experts, hidden), width // 32)
    bias = {"gate_up_proj_bias": rng.standard_normal((experts, 2 * width)).astype(ml_dtypes.bfloat16)}
    name_maps = {"down": ((TensorSlice("down_proj_blocks"),), (TensorSlice("down_proj", transposed=True),))}
    for start, name in enumerate(("gate", "up")):
        every_second = PeriodicSlice(2, start, start + 1)
        packed = TensorSlice("gate_up_proj_blocks", part=every_second, axis=1)
        name_maps[name] = ((packed,), (TensorSlice("gate_up_proj", part=every_second, axis=2, transposed=True),))
        name_maps[f"{name}_bias"] = ((TensorSlice("gate_up_proj_bias", part=every_second, axis=1),),)
    expected = {"gate": wide_full[:, ::2], "up": wide_full[:, 1::2], "down": down_full}
    expected |= {
        "gate_bias": bias["gate_up_proj_bias"][:, ::2].astype(np.float64),
        "up_bias": bias["gate_up_proj_bias"][:, 1::2].astype(np.float64),
    }
    expected = {name: as_float32(value) for name, value in expected.items()}
    shapes = {name: value.shape for name, value in expected.items()}
    stored_in(tmp_path, wide | down | bias, MXFP4)
    jax.tree.map(np.testing.assert_array_equal, read_parameters(tmp_path, name_maps, shapes, elsewhere=None), expected)
    plain = {"gate_up_proj": wide_full, "down_proj": down_full}
    plain = {name: np.ascontiguousarray(as_float32(full).swapaxes(1, 2)) for name, full in plain.items()}
    stored_in(tmp_path, plain | bias, None)
    jax.tree.map(np.testing.assert_array_equal, read_parameters(tmp_path, name_maps, shapes, elsewhere=None), expected)


def test_tensors_may_start_at_any_byte(tmp_path):
    """safetensors aligns what it writes; a file of another program need not."""
    tensors = {
        "codes": ("F8_E4M3", np.array([[0x38, 0x40, 0xB8]], np.uint8)),
        "codes_scale_inv": ("F32", np.array([[2.0]], np.float32)),
        "half": ("BF16", np.array([1.5, -3.0], ml_dtypes.bfloat16)),
    }
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, array) in tensors.items():
        end = len(data) + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), end]}
        data += array.tobytes()
    content = json.dumps(header).encode()
    content += b" " * (len(content) % 2 == 0)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + data)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": FP8}))
    params = read_parameters(
        tmp_path, {"w": single_tensor("codes"), "b": single_tensor("half")}, {"w": (1, 3), "b": (2,)}, elsewhere=None
    )
    np.testing.assert_array_equal(params["w"], np.array([[2, 4, -2]], np.float32))
    np.testing.assert_array_equal(params["b"], np.array([1.5, -3.0], np.float32))


def problems(folder, tensors, quantization, name, shape):
    stored_in(folder, tensors, quantization)
    with pytest.raises(ValueError, match=r"do not fit its config.json") as caught:
        read_parameters(folder, {"w": single_tensor(name)}, {"w": shape}, elsewhere=None)
    return [line.removeprefix("  - ") for line in str(caught.value).split("\n")[1:]]


def test_fp8_that_does_not_fit_is_named(tmp_path):
    name, shape, what = "x.weight", (7, 11), "one scale for each 3 x 5 (weight_block_size) of x.weight [7, 11]"
    pair, _ = fp8_pair(np.random.default_rng(4), name, shape)
    codes, scales = pair[name], pair["x.weight_scale_inv"]

    def lines(changed, quantization=FP8, wanted=shape):
        tensors = {key: value for key, value in (pair | changed).items() if value is not None}
        return problems(tmp_path, tensors, quantization, name, wanted)

    missing, fewer = {"x.weight_scale_inv": None}, {"x.weight_scale_inv": scales[:2].copy()}
    assert lines(missing) == [f"missing: x.weight_scale_inv [3, 3], {what}"]
    assert lines(fewer) == [f"misshapen: x.weight_scale_inv [2, 3], expected [3, 3], {what}"]
    assert lines({}, {**FP8, "weight_block_size": [7, 11]}) == [
        "misshapen: x.weight_scale_inv [3, 3], expected [1, 1], "
        "one scale for each 7 x 11 (weight_block_size) of x.weight [7, 11]"
    ]
    assert lines({"x.weight_scale_inv": np.ones((3, 3), np.int32)})[0].startswith(
        "unknown kind of number: x.weight_scale_inv is I32, expected one of ["
    )
    assert lines({}, wanted=(11, 7)) == ["misshapen: x.weight [7, 11], expected [11, 7]"]
    assert lines({name: codes[0].copy()}, wanted=(11,)) == [
        "misshapen: x.weight [11] is stored as fp8, which needs two axes or more"
    ]
    for other in (None, MXFP4):
        assert lines({}, other)[0].startswith("not in config.json: x.weight is stored as fp8, but there is no")
    plain = {name: np.ones(shape, np.float32)}
    assert lines(plain | missing) == [
        "quantization_config in config.json says fp8, but no tensor is stored so: remove it from there if the weights "
        "are plain"
    ]
    assert lines(plain, None) == ["surplus: x.weight_scale_inv [3, 3]"]  # scales of a weight that is not FP8


def test_mxfp4_that_does_not_fit_is_named(tmp_path):
    name, shape, what = "x_blocks", (3, 5, 64), "one scale for each group of x_blocks [3, 5, 2, 16]"
    pair, _ = mxfp4_pair(np.random.default_rng(5), "x", (3, 5), 2)
    scales = pair["x_scales"]

    def lines(changed, quantization=MXFP4, wanted=shape):
        tensors = {key: value for key, value in (pair | changed).items() if value is not None}
        return problems(tmp_path, tensors, quantization, name, wanted)

    assert lines({"x_scales": None}) == [f"missing: x_scales [3, 5, 2], {what}"]
    assert lines({"x_scales": scales[:, :4].copy()}) == [f"misshapen: x_scales [3, 4, 2], expected [3, 5, 2], {what}"]
    assert lines({"x_scales": scales.astype(np.float32)}) == [
        "unknown kind of number: x_scales is F32, expected one of ['U8']"
    ]
    assert lines({name: pair[name][..., :8].copy()}) == [
        "misshapen: x_blocks [3, 5, 2, 8], expected [.., rows, groups, 16]"
    ]
    assert lines({}, wanted=(3, 5, 32)) == ["misshapen: x_blocks [3, 5, 64], expected [3, 5, 32]"]
    for other in (None, FP8):
        assert lines({}, other)[0].startswith("not in config.json: x_blocks is stored as mxfp4, but there is no")


def test_nonfinite_numbers_and_scales_are_named(tmp_path):
    rng = np.random.default_rng(6)
    tensors = {}
    for name in ("good", "bad_code", "bad_scale"):
        tensors |= fp8_pair(rng, name, (7, 11))[0]
    tensors["bad_code"].view(np.uint8)[5, 9] = 0xFF
    tensors["bad_scale_scale_inv"][2, 2] = np.nan
    stored_in(tmp_path, tensors, FP8)
    names = ("good", "bad_code", "bad_scale")
    name_maps, shapes = {name: single_tensor(name) for name in names}, dict.fromkeys(names, (7, 11))
    label = "bad_code with bad_code_scale_inv, bad_scale with bad_scale_scale_inv"
    with pytest.warns(NonFiniteWeightWarning, match=rf"in 2 weight\(s\) of .*: {label}$"):
        params = read_parameters(tmp_path, name_maps, shapes)
    assert np.isnan(params["bad_code"]).sum() == 1 and np.isnan(params["bad_scale"][6, 10])
    assert np.isnan(params["bad_scale"]).sum() == 1  # the last block has one row and one column

    tensors = mxfp4_pair(rng, "x", (5,), 2)[0]
    tensors["x_scales"][3, 1] = 255  # E8M0's NaN
    stored_in(tmp_path, tensors, MXFP4)
    with pytest.warns(NonFiniteWeightWarning, match=r": x_blocks with x_scales$"):
        params = read_parameters(tmp_path, {"w": single_tensor("x_blocks")}, {"w": (5, 64)})
    assert np.isnan(params["w"][3, 32:]).all() and np.isnan(params["w"]).sum() == 32


def test_the_error_of_a_folder_lists_experts_of_both_kinds(tmp_path):
    """Separate experts, one of which has lost its scales and another one itself."""
    rng = np.random.default_rng(7)
    tensors = {}
    for e in range(3):
        for name, shape in (("gate", (5, 7)), ("up", (5, 7)), ("down", (7, 5))):
            tensors |= fp8_pair(rng, f"experts.{e}.{name}", shape)[0]
    del tensors["experts.1.up_scale_inv"], tensors["experts.2.down"]
    stored_in(tmp_path, tensors, FP8)
    names = {name: f"experts.{{}}.{name}" for name in ("gate", "up", "down")}
    name_maps = dict(gated_experts(3, 5, **names, stacked_gate_up="gate_up", stacked_down="down"))
    with pytest.raises(ValueError) as caught:
        read_parameters(tmp_path, name_maps, {"gate": (3, 5, 7), "up": (3, 5, 7), "down": (3, 7, 5)}, elsewhere=None)
    assert [line.strip("- ").partition(",")[0] for line in str(caught.value).split("\n")[1:]] == [
        "missing: experts.2.down [7",
        "missing: experts.1.up_scale_inv [2",
        "surplus: experts.2.down_scale_inv [3",
    ]


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_quantised_stack_is_read_in_pieces(tmp_path, method):
    """Besides the parameter's own buffer and its page: some pieces, not a stored tensor as float32 (32 MiB)."""
    experts, width, hidden = 2, 2048, 1024
    if method == "fp8":
        codes = np.zeros((experts, 2 * width, hidden), np.uint8).view(ml_dtypes.float8_e4m3fn)
        tensors = {"x": codes, "x_scale_inv": np.ones((experts, 32, 8), np.float32)}
        stored_in(tmp_path, tensors, {**FP8, "weight_block_size": [128, 128]})
    else:
        blocks = np.zeros((experts, 2 * width, hidden // 32, 16), np.uint8)
        stored_in(tmp_path, {"x_blocks": blocks, "x_scales": blocks[..., 0].copy()}, MXFP4)
    name = "x" if method == "fp8" else "x_blocks"
    name_map, shape = (TensorSlice(name, part=PeriodicSlice(2, 1, 2), axis=1),), (experts, width, hidden)
    peak, buffer = peak_bytes(tmp_path, name_map, shape), 4 * experts * width * hidden + 2**21
    assert buffer <= peak <= buffer + 6 * reading.PIECE_BYTES, (peak - buffer) / reading.PIECE_BYTES


LLAMA = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 30,
    "intermediate_size": 41,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


@pytest.mark.parametrize(
    ("quantization", "problem"),
    [
        (
            {"quant_method": "aqlm", "bits": 4},
            "quantization_config must be null or absent, or have a quant_method of awq",
        ),
        ({"quant_method": ["fp8"]}, "use a checkpoint with plain"),
        ({"bits": 4}, "use a checkpoint with plain"),
        ("fp8", "use a checkpoint with plain"),
        ({**FP8, "fmt": "e5m2"}, "quantization_config.fmt must be e4m3 or absent with quant_method fp8, got 'e5m2'"),
        (
            {**FP8, "activation_scheme": "static"},
            "quantization_config.activation_scheme must be dynamic or absent with quant_method fp8, got 'static'",
        ),
        (
            {**FP8, "expert_dtype": "fp4"},
            "quantization_config.expert_dtype must be fp8 or absent with quant_method fp8, got 'fp4'",
        ),
        (
            {**FP8, "weight_block_size": None},
            "quantization_config.weight_block_size must be two whole numbers from 1 on",
        ),
        ({**FP8, "weight_block_size": [128]}, "quantization_config.weight_block_size must be two"),
        ({**FP8, "weight_block_size": [128, 0]}, "quantization_config.weight_block_size must be two"),
        ({**FP8, "zero_point": True}, r"quant_method fp8 has fields that are not understood: \['zero_point'\]"),
        ({**MXFP4, "group_size": 16}, r"quant_method mxfp4 has fields that are not understood: \['group_size'\]"),
    ],
)
def test_unsupported_quantisation_is_refused(quantization, problem):
    with pytest.raises(ValueError, match=problem):
        read_config(LLAMA | {"quantization_config": quantization})


def test_quantisation_changes_no_config():
    for quantization in (FP8, {**FP8, "scale_fmt": "ue8m0"}, {"quant_method": "fp8"}, MXFP4):
        assert read_config(LLAMA | {"quantization_config": quantization}) == read_config(LLAMA)
