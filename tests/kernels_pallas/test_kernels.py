"""The list of kernels is that of the folders, and importing it does not import Pallas."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from decodax import kernels_pallas
from decodax.kernels_pallas import KERNELS, hopper, module_of, selection, shapes_of
from decodax.kernels_pallas.flash_prefill import select_flash_prefill

FOLDER = Path(kernels_pallas.__file__).parent


def test_every_folder_is_listed():
    folders = {path.parent.name for path in FOLDER.glob("*/__init__.py")} - {"decode"}  # what several share
    assert {name.removeprefix("decodax.kernels_pallas.") for name in KERNELS.values()} == folders
    for kernel in KERNELS:
        assert callable(getattr(module_of(kernel), kernel))
    with pytest.raises(ValueError, match=r"flash_decode.*got 'flash'"):
        module_of("flash")


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_real_sizes(kernel):
    shapes = shapes_of(kernel)
    assert len(shapes) >= 3
    for shape in shapes.values():
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shape.operands()))
        assert shape.bytes_moved() > 0 and shape.flops() > 0
        made = jax.eval_shape(lambda shape=shape: shape.random_operands(0))
        assert jax.tree.map(_described, made) == jax.tree.map(_described, shape.operands())


def _described(leaf):
    return leaf.shape, leaf.dtype


def test_no_shape_is_left_out():
    listed = {kernel: set(shapes_of(kernel)) for kernel in KERNELS}
    for module in set(KERNELS.values()):
        everything = set(sys.modules[f"{module}.shapes"].SHAPES)
        assert set().union(*(listed[kernel] for kernel in KERNELS if KERNELS[kernel] == module)) == everything


def test_importing_kernels_imports_no_pallas():
    modules = ["decodax.kernels_pallas", *set(KERNELS.values())]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "print([name for name in sys.modules if name.startswith('jax.experimental.pallas')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("version", "runs"),
    [(None, "gpu"), (12_060, "gpu"), (12_080, "xla"), (12_090, "xla"), (12_091, "gpu"), (13_000, "gpu")],
)
def test_causal_kernels_do_not_run_where_ptxas_may_be_wrong(monkeypatch, version, runs):
    """As JAX's own attention on GPUs, which refuses CUDA 12.8 to 12.9.0."""
    monkeypatch.setattr(selection, "backend_of_this_device", lambda: ("gpu", "the device is there"))
    monkeypatch.setattr(hopper, "cuda_version", lambda: version)
    query, key = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 128, 8, 64), (1, 2, 128, 64)))
    found = select_flash_prefill(query, key, key)
    assert found.implementation == runs and ("install CUDA 13" in found.reason) == (runs == "xla")
