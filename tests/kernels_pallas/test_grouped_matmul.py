"""Grouped products equal a loop over experts in NumPy float64, on every implementation; compiled for TPU and CUDA."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from decodax.kernels_pallas import compat, selection
from decodax.kernels_pallas.grouped_matmul import grouped_gate_up, grouped_matmul, select_grouped_matmul
from decodax.kernels_pallas.grouped_matmul.shapes import SHAPES
from decodax.kernels_pallas.grouped_matmul.work import most_items, work_list
from tests.kernels_pallas.ahead_of_time import CHIPS, compile_for_tpu, count_kernels

IMPLEMENTATIONS = ["xla", "tpu_interpreted", "gpu_interpreted"]

# M, D, F, dtype, group sizes, whether gate and up at once. The GPU's kernel takes D and F in multiples of 64. It has
# tiles of 64 or 128 rows, and keeps the operands of 3 to 5 steps of D.
CASES = {
    "empty groups, one row, rows of nobody": (100, 63, 200, "float32", [0, 30, 1, 0, 40, 9], True),
    "nothing at all": (20, 63, 100, "float32", [0, 0, 0], False),
    "whole tiles and remainders": (300, 100, 192, "bfloat16", [255, 0, 44], False),
    "more groups than rows": (5, 63, 40, "float32", [0, 0, 2, 0, 1, 0, 0, 0, 1, 0, 0, 0], True),
    "few tokens, many steps": (13, 1000, 79, "bfloat16", [1, 0, 7, 2, 3], False),
    "gated whole tiles, many steps": (200, 320, 128, "bfloat16", [130, 64], True),
}


def oracle(tokens: np.ndarray, weight: np.ndarray, group_sizes: list[int]) -> np.ndarray:
    result = np.zeros((len(tokens), weight.shape[1]))
    start = 0
    for expert, size in enumerate(group_sizes):
        for row in range(start, start + size):
            result[row] = weight[expert] @ tokens[row]
        start += size
    return result


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.quick_cases(6)
def test_equals_a_loop_over_experts(case, implementation):
    num_rows, size, num_outputs, dtype, group_sizes, gated = CASES[case]
    if implementation == "gpu_interpreted":
        size, num_outputs = min(448, -(-size // 64) * 64), -(-num_outputs // 64) * 64
    random = np.random.default_rng(7)
    tokens = random.standard_normal((num_rows, size))
    weights = random.standard_normal((1 + gated, len(group_sizes), num_outputs, size)) * size**-0.5
    rounded = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in (tokens, *weights)]
    wanted = oracle(rounded[0], rounded[1], group_sizes)
    if gated:
        wanted = wanted / (1 + np.exp(-wanted)) * oracle(rounded[0], rounded[2], group_sizes)

    tokens[sum(group_sizes) :] = np.nan  # rows of no group
    weights[:, np.array(group_sizes) == 0] = np.nan
    function = jax.jit(partial(grouped_gate_up if gated else grouped_matmul, implementation=implementation))
    result = function(*(jnp.asarray(x, dtype) for x in (tokens, *weights)), jnp.asarray(group_sizes, jnp.int32))
    assert result.dtype == jnp.dtype(dtype)
    result = np.asarray(result, np.float64)
    # Sums are float32, of numbers around 1; a result is rounded once, in bfloat16 by at most 2^-8 of itself.
    tolerance = {"float32": 1e-5, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    assert not np.any(result[sum(group_sizes) :])


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_work_is_that_of_the_rows_that_exist(multiple):
    random = np.random.default_rng(3)
    listed_work = jax.jit(work_list, static_argnums=(1, 2), static_argnames="multiple")
    for num_rows, tile_rows, group_sizes in [
        (5, 8, [1, 0, 1, 1, 2]),
        (97, 8, [0, 0, 0, 0, 0, 0]),
        (97, 8, [8, 8, 8, 8, 8, 57]),
        (97, 8, [1, 8, 8, 8, 0, 0]),
        (97, 8, [0, 0, 97, 0, 0, 0]),
        *((97, 8, random.multinomial(random.integers(98), [1 / 6] * 6)) for _ in range(10)),
    ]:
        items = []  # (row, group, first, last), listed by hand
        end = 0
        for group, size in enumerate([*group_sizes, num_rows - sum(group_sizes)]):
            start, end = end, end + int(size)
            row = start // multiple * multiple
            while size and row < end:
                items.append((row, group, max(start, row), min(end, row + tile_rows)))
                row += tile_rows
        products = [item for item in items if item[1] < len(group_sizes)]
        work = listed_work(jnp.asarray(group_sizes, jnp.int32), num_rows, tile_rows, multiple=multiple)
        assert work.counts.tolist() == [len(products), len(items)]
        listed = np.stack([work.row, work.group, work.first, work.last], axis=1)
        assert len(listed) == most_items(num_rows, len(group_sizes), tile_rows, multiple) >= len(items)
        assert [tuple(item) for item in listed[: len(products)]] == products
        rest = [(row, first, last) for row, _, first, last in items[len(products) :]]
        assert [tuple(item) for item in listed[len(products) : len(items), [0, 2, 3]]] == rest
        # Items without a product use the weights before them, and padding items what is loaded already.
        assert set(listed[len(products) :, 1]) <= {products[-1][1] if products else listed[0, 1]}
        assert np.all(listed[len(items) :] == listed[len(items) - 1])


def test_the_bound_on_items_is_reached():
    worst = jnp.asarray([7, 8, 8, 8, 1], jnp.int32)  # four groups begin inside a tile, and so do rows of no group
    work = work_list(worst, 40, 8, multiple=8)
    assert work.counts[1] == 5 + 5 - 1 <= len(work.row) == 5 + 5
    work = work_list(jnp.full((5,), 9, jnp.int32), 48, 8, multiple=1)
    assert work.counts[1] == 5 * 2 + 1 <= len(work.row) == 6 + 6


def test_rows_that_do_not_exist_are_left_out_where_sizes_are_not_known():
    tokens, weight = jnp.ones((5, 8)), jnp.arange(1.0, 4.0)[:, None, None] * jnp.ones((3, 2, 8))
    for implementation in ("xla", "tpu_interpreted"):
        run = jax.jit(partial(grouped_matmul, implementation=implementation))
        result = run(tokens, weight, jnp.asarray([2, -1, 9], jnp.int32))
        np.testing.assert_array_equal(result[:, 0], [8.0, 8.0, 24.0, 24.0, 24.0])


def test_the_reference_has_derivatives():
    random = np.random.default_rng(1)
    tokens, weight, group_sizes = random.standard_normal((11, 5)), random.standard_normal((3, 7, 5)), [4, 0, 6]
    weights_of_rows = np.concatenate([weight[[0] * 4 + [2] * 6], np.zeros((1, 7, 5))])

    def loss(tokens, weight):
        return jnp.sum(grouped_matmul(tokens, weight, jnp.asarray(group_sizes, jnp.int32)) ** 2)

    grad_tokens, grad_weight = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        jnp.asarray(tokens, jnp.float32), jnp.asarray(weight, jnp.float32)
    )
    upstream = 2 * np.einsum("mfd,md->mf", weights_of_rows, tokens)
    np.testing.assert_allclose(grad_tokens, np.einsum("mf,mfd->md", upstream, weights_of_rows), rtol=1e-4, atol=1e-4)
    outer = upstream[:, :, None] * tokens[:, None]
    wanted = np.stack([outer[:4].sum(0), 0 * outer[0], outer[4:10].sum(0)])
    np.testing.assert_allclose(grad_weight, wanted, rtol=1e-4, atol=1e-4)


def test_no_rows_give_no_results():
    assert grouped_matmul(jnp.zeros((0, 8)), jnp.zeros((2, 3, 8)), jnp.zeros(2, jnp.int32)).shape == (0, 3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": jnp.zeros((2, 3, 8))}, r"tokens must be \[M, D\]"),
        ({"weight": jnp.zeros((3, 8, 4))}, "outputs x inputs"),
        ({"weight": jnp.zeros((3, 4, 8), jnp.bfloat16)}, "the tokens' dtype float32, got bfloat16"),
        ({"group_sizes": jnp.zeros(2, jnp.int32)}, r"one per expert \(3\)"),
        ({"group_sizes": jnp.asarray([3, 2, 1], jnp.int32)}, "at most 5"),
        ({"group_sizes": jnp.asarray([3, -1, 1], jnp.int32)}, "smallest -1"),
    ],
)
def test_bad_input(changed, words):
    operands = {"tokens": jnp.zeros((5, 8)), "weight": jnp.zeros((3, 4, 8)), "group_sizes": jnp.zeros(3, jnp.int32)}
    unchecked = inspect.unwrap(grouped_matmul)  # outside tests annotations are not checked
    with pytest.raises(ValueError, match=words):
        unchecked(**{**operands, **changed})


@pytest.mark.parametrize(
    ("backend", "size", "num_outputs", "dtype", "words"),
    [
        ("gpu", 100, 64, "bfloat16", "multiple of 64 numbers"),
        ("gpu", 64, 100, "bfloat16", "multiple of 64 outputs"),
        ("gpu", 64, 64, "float32", "bfloat16 and float16"),
        ("tpu", 64, 64, "float16", "float32 and bfloat16"),
        ("tpu", 2**20, 1024, "bfloat16", "VMEM"),
    ],
)
def test_xla_runs_what_a_kernel_does_not_take(backend, size, num_outputs, dtype, words, monkeypatch):
    monkeypatch.setattr(selection, "backend_of_this_device", lambda: (backend, "the device is there"))
    tokens = jax.ShapeDtypeStruct((24, size), jnp.dtype(dtype))
    weight = jax.ShapeDtypeStruct((4, num_outputs, size), jnp.dtype(dtype))
    chosen = select_grouped_matmul(tokens, weight)
    assert chosen.implementation == "xla" and words in chosen.reason
    with pytest.raises(NotImplementedError, match=words):
        select_grouped_matmul(tokens, weight, implementation=backend)


def function_of(name: str, implementation: str):
    return partial(grouped_gate_up if SHAPES[name].gated else grouped_matmul, implementation=implementation)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "name",
    [
        "deepseek-v2-lite one product, prefill 4k",
        "mixtral-8x7b gate and up, decode, batch 8",
        "qwen3-30b-a3b gate and up, prefill 4k",
    ],
)
def test_compiles_for_tpu(chip, name):
    operands = SHAPES[name].operands()
    function = function_of(name, "tpu")
    compiled = compile_for_tpu(chip, lambda operands: function(**operands), operands)
    assert count_kernels(compiled, "grouped_gate_up" if SHAPES[name].gated else "grouped_matmul") == 1
    weight_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in operands.values() if len(leaf.shape) == 3)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * weight_bytes  # no copy of weights


@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_cuda(name):
    operands = SHAPES[name].operands()
    function = function_of(name, "gpu")
    exported = jax.export.export(jax.jit(lambda *leaves: function(*leaves)), platforms=["cuda"])(*operands.values())
    assert exported.mlir_module().count("mosaic_gpu") >= 1


def test_a_shape_counts_the_bytes_that_must_be_moved():
    shape = SHAPES["mixtral-8x7b gate and up, decode, batch 8"]
    sizes = shape.group_sizes()
    assert sizes.sum() == 16 == shape.num_rows and (sizes > 0).sum() == 8
    assert shape.bytes_moved() == 2 * (16 * (4096 + 14336) + 2 * 8 * 4096 * 14336)
    assert shape.flops() == 2 * 2 * 16 * 4096 * 14336


@pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="interpreters before JAX 0.12 see no such races")
def test_the_warpgroups_do_not_race(monkeypatch):
    """Accesses to shared memory are ordered by barriers, and by fences between ordinary ones and those of copies."""
    detecting = plgpu.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(compat, "_gpu_interpreter", lambda interpret: detecting)
    tokens, weight = jnp.ones((300, 384), jnp.bfloat16), jnp.ones((3, 64, 384), jnp.bfloat16)
    sizes = jnp.asarray([255, 0, 44], jnp.int32)
    result = grouped_gate_up(tokens, weight, weight, sizes, implementation="gpu_interpreted")  # a race raises
    assert np.all(np.asarray(result)[:299] == np.asarray(result)[0])
