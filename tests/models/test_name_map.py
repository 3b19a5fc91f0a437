"""Parameters that are not one stored tensor: slices, transposed tensors, stacks, and files of either name map."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from safetensors.numpy import load_file, save_file

from decodax.core.weight import Weight
from decodax.models.checkpoints import reading
from decodax.models.checkpoints.name_map import (
    PeriodicSlice,
    TensorSlice,
    full_region,
    gated_experts,
    single_tensor,
    stack,
)
from decodax.models.checkpoints.reading import NonFiniteWeightWarning, load_params, open_auxiliary_weights
from decodax.models.configs.hf_config import load_config
from decodax.models.families.contract import BLOCK_TENSORS
from tests.checkpoint_parameters import peak_bytes, read_parameters
from tests.golden_files import load_golden

E, F, D = 3, 5, 7


def test_a_periodic_slice_counts_like_a_loop():
    for periodic in (
        PeriodicSlice(7, 2, 5),
        PeriodicSlice(4, 0, 4),
        PeriodicSlice(6, 5, 6),
        PeriodicSlice(1, 0, 1),
        PeriodicSlice(5, 0, 3),
    ):
        period = periodic.period
        positions = [i for i in range(3 * period) if periodic.start <= i % period < periodic.stop]
        axis = np.arange(3 * period)
        for first in range(len(positions)):
            for end in range(first + 1, len(positions) + 1):
                assert axis[periodic.indices(first, end)].tolist() == positions[first:end], (periodic, first, end)
    assert isinstance(PeriodicSlice(7, 2, 5).indices(1, 3), slice) and isinstance(
        PeriodicSlice(2, 1, 2).indices(3, 9), slice
    )
    for wrong in ((3, 2, 2), (3, -1, 2), (3, 1, 4)):
        with pytest.raises(ValueError, match=r"a periodic slice must have 0 <= start < stop <= period"):
            PeriodicSlice(*wrong)


# name: (stored shape, source, parameter's shape, the number at an index of the parameter, out of the stored tensor)
SLICES = {
    "transposed": ((D, F), {"transposed": True}, (F, D), lambda x, f, d: x[d, f]),
    "second_half": ((2 * F, D), {"part": PeriodicSlice(2 * F, F, 2 * F)}, (F, D), lambda x, f, d: x[F + f, d]),
    "half_of_stack": (
        (E, 2 * F, D),
        {"part": PeriodicSlice(2 * F, F, 2 * F), "axis": 1},
        (E, F, D),
        lambda x, e, f, d: x[e, F + f, d],
    ),
    "odd_rows": (
        (E, 2 * F, D),
        {"part": PeriodicSlice(2, 1, 2), "axis": 1},
        (E, F, D),
        lambda x, e, f, d: x[e, 2 * f + 1, d],
    ),
    "odd_columns_transposed": (
        (E, D, 2 * F),
        {"part": PeriodicSlice(2, 1, 2), "axis": 2, "transposed": True},
        (E, F, D),
        lambda x, e, f, d: x[e, d, 2 * f + 1],
    ),
    "half_of_inputs_transposed": (
        (E, 2 * D, F),
        {"part": PeriodicSlice(2 * D, 0, D), "axis": 1, "transposed": True},
        (E, F, D),
        lambda x, e, f, d: x[e, d, f],
    ),
    "odd_bias": ((E, 2 * F), {"part": PeriodicSlice(2, 1, 2), "axis": 1}, (E, F), lambda x, e, f: x[e, 2 * f + 1]),
    "part_of_vector": ((11,), {"part": PeriodicSlice(11, 2, 7)}, (5,), lambda x, i: x[2 + i]),
    "values_of_heads": (
        (3 * 5, D),
        {"part": PeriodicSlice(5, 2, 5)},
        (3 * 3, D),
        lambda x, i, d: x[i // 3 * 5 + 2 + i % 3, d],
    ),
    "values_of_heads_apart": (
        (3 * 5, D),
        {"part": PeriodicSlice(5, 2, 5), "shape": (3 * 5, D)},
        (3, 3, D),
        lambda x, n, h, d: x[5 * n + 2 + h, d],
    ),
    "convolution": (
        (13, 1, 4),
        {"part": PeriodicSlice(13, 2, 7), "shape": (13, 1, 4)},
        (5, 4),
        lambda x, c, i: x[2 + c, 0, i],
    ),
    "odd_experts": (
        (6, F, D),
        {"part": PeriodicSlice(2, 1, 2), "axis": 0},
        (E, F, D),
        lambda x, e, f, d: x[2 * e + 1, f, d],
    ),
    "number": ((), {}, (), lambda x: x[()]),
}


@pytest.mark.parametrize("piece_bytes", [1, 100, 2**20])
def test_slices_go_where_a_loop_puts_them(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, (shape, *_) in SLICES.items()}
    name_maps = {name: ((TensorSlice(name, **source),),) for name, (_, source, *_) in SLICES.items()}
    # a stack whose members are fused and transposed themselves
    tensors |= {f"expert.{e}": rng.standard_normal((D, 2 * F)).astype(np.float32) for e in range(E)}
    half = {"part": PeriodicSlice(2 * F, F, 2 * F), "axis": 1, "transposed": True}
    name_maps["stack"] = (tuple(TensorSlice(f"expert.{e}", at=e, **half) for e in range(E)),)
    save_file(tensors, tmp_path / "model.safetensors")
    params = read_parameters(
        tmp_path, name_maps, {name: shape for name, (_, _, shape, _) in SLICES.items()} | {"stack": (E, F, D)}
    )
    for name, (_, _, shape, number) in SLICES.items():
        for index in np.ndindex(shape):
            assert params[name][index] == number(tensors[name], *index), (name, index)
    for e, f, d in np.ndindex(E, F, D):
        assert params["stack"][e, f, d] == tensors[f"expert.{e}"][d, F + f]


@pytest.mark.parametrize("piece_bytes", [1, 100, 2**20])
@pytest.mark.parametrize("stored", ["float32", "float8", "array"])
def test_any_region_is_read_by_itself(tmp_path, monkeypatch, piece_bytes, stored):
    """Regions of every parameter, from safetensors, FP8 blocks of 2 x 3 and Orbax arrays, equal NumPy's."""
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    rng = np.random.default_rng(0)
    slices = {name: case for name, case in SLICES.items() if stored != "float8" or len(case[0]) > 1}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, (shape, *_) in slices.items()}
    name_maps = {name: ((TensorSlice(name, **source),),) for name, (_, source, *_) in slices.items()}
    tensors |= {f"expert.{e}": rng.standard_normal((D, 2 * F)).astype(np.float32) for e in range(E)}
    half = {"part": PeriodicSlice(2 * F, F, 2 * F), "axis": 1, "transposed": True}
    name_maps["stack"] = (tuple(TensorSlice(f"expert.{e}", at=e, **half) for e in range(E)),)
    shapes = {name: shape for name, (_, _, shape, _) in slices.items()} | {"stack": (E, F, D)}
    if stored == "float8":
        scales = {
            f"{name}_scale_inv": rng.standard_normal((*x.shape[:-2], -(-x.shape[-2] // 2), -(-x.shape[-1] // 3)))
            for name, x in tensors.items()
        }
        tensors = {name: x.astype(ml_dtypes.float8_e4m3fn) for name, x in tensors.items()}
        tensors |= {name: scale.astype(np.float32) for name, scale in scales.items()}
        settings = {"quant_method": "fp8", "weight_block_size": [2, 3]}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    save_file(tensors, tmp_path / "model.safetensors")
    weights = {name: Weight(("V",) * len(shape), shape) for name, shape in shapes.items()}
    opened = open_auxiliary_weights(tmp_path, {(name,): name_map for name, name_map in name_maps.items()}, weights)
    if stored == "array":
        arrays = {
            name: opened.read((name,), full_region(shape), np.dtype(np.float32)) for name, shape in shapes.items()
        }
        checkpointer = orbax.checkpoint.PyTreeCheckpointer(use_ocdbt=piece_bytes == 1)
        checkpointer.save(tmp_path / "params", arrays)
        opened = open_auxiliary_weights(tmp_path, {}, weights)
    for name, shape in shapes.items():
        full = opened.read((name,), full_region(shape), np.dtype(np.float32))
        for _ in range(20):
            bounds = [sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in shape]
            region = tuple(slice(*bound) for bound in bounds)
            region_read = opened.read((name,), region, np.dtype(np.float32))
            np.testing.assert_array_equal(region_read, full[region], err_msg=f"{name} {region}")


def test_a_name_map_that_cannot_fill_its_parameter_is_refused(tmp_path):
    save_file({"x": np.ones((E, F), np.float32)}, tmp_path / "model.safetensors")
    for source, shape in (
        (TensorSlice("x", shape=(E, F)), (E, F, D)),
        (TensorSlice("x", part=PeriodicSlice(4, 0, 2), axis=1), (E, F)),
    ):
        with pytest.raises(ValueError, match=r"does not fill a parameter of shape"):
            read_parameters(tmp_path, {"w": ((source,),)}, {"w": shape})
    for name_map in (
        stack("x", 2),
        (TensorSlice("x"), TensorSlice("x")),
        (TensorSlice("x", at=1), TensorSlice("x", at=0), TensorSlice("x", at=2)),
    ):
        with pytest.raises(
            ValueError, match=r"the name map of w \[3, 5\] must be one tensor slice, or one for each index"
        ):
            read_parameters(tmp_path, {"w": (name_map,)}, {"w": (E, F)})


NAMES = {name: f"layer.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")}
EXPERTS = gated_experts(
    E, F, **NAMES, stacked_gate_up="layer.experts.gate_up_proj", stacked_down="layer.experts.down_proj"
)
SHAPES = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}


@pytest.fixture
def experts():
    """The same experts as parameters, as separate tensors and as stacked ones."""
    rng = np.random.default_rng(1)
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    separate = {NAMES[name].format(e): params[name][e].copy() for name in params for e in range(E)}
    stacked = {
        "layer.experts.gate_up_proj": np.concatenate([params["gate"], params["up"]], axis=1),
        "layer.experts.down_proj": params["down"],
    }
    return params, separate, stacked


def read_experts(folder, tensors, **options):
    save_file(tensors, folder / "model.safetensors")
    return read_parameters(folder, EXPERTS, SHAPES, **{"elsewhere": None} | options)


def refusal(folder, tensors, **options):
    """The lines of the error that these tensors cause."""
    with pytest.raises(ValueError, match=r"do not fit its config.json") as caught:
        read_experts(folder, tensors, **options)
    return [line.removeprefix("  - ") for line in str(caught.value).split("\n")[1:]]


def test_experts_are_read_separate_and_stacked(tmp_path, experts):
    params, separate, stacked = experts
    jax.tree.map(np.testing.assert_array_equal, read_experts(tmp_path, separate), params)
    jax.tree.map(np.testing.assert_array_equal, read_experts(tmp_path, stacked), params)


def test_missing_tensors_are_named_by_the_name_map_of_the_files(tmp_path, experts):
    _, separate, stacked = experts
    lost = "layer.experts.1.up_proj.weight"
    assert refusal(tmp_path, {name: value for name, value in separate.items() if name != lost}) == [
        f"missing: {lost} [5, 7]"
    ]
    # Both parameters in it miss it: one line, and the name maps cannot be distinguished.
    lost = "layer.experts.gate_up_proj"
    assert refusal(tmp_path, {name: value for name, value in stacked.items() if name != lost}) == [
        *(f"missing: layer.experts.{e}.gate_proj.weight [5, 7]" + (f", or {lost} [3, 10, 7]" if e == 0 else "")
          for e in range(E)),
        *(f"missing: layer.experts.{e}.up_proj.weight [5, 7]" + (f", or {lost} [3, 10, 7]" if e == 0 else "")
          for e in range(E)),
    ]  # fmt: skip


def test_both_name_maps_together_are_refused(tmp_path, experts):
    _, separate, stacked = experts
    again = "of another name map than the rest: keep one of the two"
    lines = refusal(tmp_path, separate | stacked)
    assert sorted(lines) == [
        f"surplus: layer.experts.down_proj [3, 7, 5], {again}",
        f"surplus: layer.experts.gate_up_proj [3, 10, 7], {again}",
    ]
    name = "layer.experts.2.down_proj.weight"
    # A parameter's own tensors are never another's.
    assert refusal(tmp_path, stacked | {name: separate[name]}, elsewhere=".*") == [f"surplus: {name} [7, 5], {again}"]


def test_experts_of_a_wrong_shape_and_many_problems(tmp_path, experts):
    _, separate, stacked = experts
    separate["layer.experts.0.down_proj.weight"] = np.ones((F, D), np.float32)
    separate["layer.experts.2.down_proj.weight"] = np.ones((D, F), np.int32)
    assert refusal(tmp_path, separate) == [
        "misshapen: layer.experts.0.down_proj.weight [5, 7], expected [7, 5]",
        "unknown kind of number: layer.experts.2.down_proj.weight is I32, expected one of "
        "['BF16', 'F16', 'F32', 'F64'], or a weight format that config.json names",
    ]
    stacked["layer.experts.gate_up_proj"] = np.ones((E, D, 2 * F), np.float32)
    assert refusal(tmp_path, stacked) == ["misshapen: layer.experts.gate_up_proj [3, 7, 10], expected [3, 10, 7]"]
    lines = refusal(tmp_path, stacked | {f"other.{i}": np.ones(1, np.float32) for i in range(70)})
    assert len(lines) == 21 and lines[-1] == "and 51 more surplus"


def test_nonfinite_experts_are_named(tmp_path, experts):
    _, separate, _ = experts
    separate["layer.experts.1.up_proj.weight"][4, 6] = np.nan
    with pytest.warns(NonFiniteWeightWarning, match=r"in 1 weight\(s\) of .*: layer.experts.1.up_proj.weight$"):
        read_experts(tmp_path, separate)


def test_a_family_defines_fused_tensors_and_foreign_ones(tmp_path):
    """A llama with gate and up in one tensor, with a foreign layer at the end, and as a base model."""
    golden = load_golden("llama_tied").folder
    shutil.copy(golden / "config.json", tmp_path)
    family, config = load_config(golden)
    tensors = load_file(golden / "model.safetensors")
    expected = load_params(golden, family, config, dtype=np.dtype(np.float32))
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}.mlp."
        halves = [tensors.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up")]
        tensors[f"{prefix}gate_up_proj.weight"] = np.concatenate(halves)
    tensors[f"model.layers.{config.num_layers}.mlp.gate_up_proj.weight"] = np.ones((2, 2), np.float32)

    def block_tensors(block):
        size = block.feed_forward.layer.intermediate_size
        slices = {"gate": PeriodicSlice(2 * size, 0, size), "up": PeriodicSlice(2 * size, size, 2 * size)}
        fused = {name: ((TensorSlice("mlp.gate_up_proj.weight", part=half),),) for name, half in slices.items()}
        return {**BLOCK_TENSORS, **{f"feed_forward/{name}": name_maps for name, name_maps in fused.items()}}

    fused = dataclasses.replace(family, block_tensors=block_tensors)
    apart = dataclasses.replace(fused, elsewhere=lambda config: rf"model\.layers\.{config.num_layers}\..*")
    for names in (tensors, {name.removeprefix("model."): value for name, value in tensors.items()}):
        save_file(names, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"surplus: (model.)?layers.\d.mlp.gate_up_proj.weight \[2, 2\]$"):
            load_params(tmp_path, fused, config, dtype=np.dtype(np.float32))
        params = load_params(tmp_path, apart, config, dtype=np.dtype(np.float32))
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    with pytest.raises(ValueError, match=r"llama checkpoints cannot be written: blocks_0/feed_forward/gate is stored"):
        fused.tensor_names(config)


def test_auxiliary_weights_are_loaded_by_themselves(tmp_path):
    """Tensors outside the name maps are ignored; order and progress are those of the files, not of the names."""
    tensors = {name: np.full(3, index, np.float32) for index, name in enumerate("abc")}
    tensors["a"] = tensors["a"].astype(np.float16)  # stored after what has more bytes
    save_file(tensors, tmp_path / "model.safetensors")
    reports = []
    shapes = {"one": (3,), "two": (3,)}
    params = read_parameters(
        tmp_path,
        {"one": single_tensor("a"), "two": single_tensor("c")},
        shapes,
        progress=lambda *bytes_: reports.append(bytes_),
    )
    assert params["one"][0] == 0 and params["two"][0] == 2
    assert list(params) == ["two", "one"] and reports == [(12, 24), (24, 24)]


@pytest.mark.parametrize("kind", ["half", "transposed", "separate"])
def test_a_stack_is_read_in_pieces(tmp_path, kind):
    """Besides the parameter's own buffer and its page: some pieces, not a stored tensor of 32 MiB, nor an expert's."""
    experts, width, hidden = 2, 2048, 1024
    shape = (experts, width, hidden)
    tensors, name_map = {"x": np.ones((experts, 2 * width, hidden), ml_dtypes.bfloat16)}, (TensorSlice("x"),)
    if kind == "half":
        name_map = (TensorSlice("x", part=PeriodicSlice(2 * width, width, 2 * width), axis=1),)
    elif kind == "transposed":
        tensors["x"] = tensors["x"].reshape(experts, hidden, 2 * width)
        name_map = (TensorSlice("x", part=PeriodicSlice(2, 1, 2), axis=2, transposed=True),)
    else:
        tensors, name_map = (
            {f"x.{e}": np.ones((width, hidden), np.float32) for e in range(experts)},
            stack("x.{}", experts),
        )
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    peak, buffer = peak_bytes(tmp_path, name_map, shape), 4 * experts * width * hidden + 2**21
    assert buffer <= peak <= buffer + 4 * reading.PIECE_BYTES, (peak - buffer) / reading.PIECE_BYTES
