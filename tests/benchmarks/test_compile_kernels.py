"""Kernels are compiled for absent chips: what is read from compiler output, and what counts as a failure."""

import json

import jax
import pytest

from benchmarks import _ahead_of_time as ahead_of_time
from benchmarks import _bench_kernel_cases as kernel_cases
from benchmarks import compile_kernels

pytestmark = pytest.mark.slow

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'flash_decode_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for flash_decode_mosaic_gpu_kernel
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 134 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 47.625 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'merge_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for merge_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


def test_ptxas_output_is_parsed():
    first, second = ahead_of_time.read_ptxas(PTXAS)
    assert first == {
        "name": "flash_decode_mosaic_gpu_kernel",
        "registers": 134,
        "spill_store_bytes": 24,
        "spill_load_bytes": 32,
        "stack_bytes": 16,
    }
    assert second["registers"] == 40 and compile_kernels.spills(second) == 0
    assert ahead_of_time.read_ptxas("nothing") == []
    with pytest.raises(ValueError, match="registers"):
        ahead_of_time.read_ptxas(PTXAS.replace("Used 40 registers", ""))


def test_shared_memory_is_read_from_a_gpu_program():
    (case,) = kernel_cases.quick_cases("flash_decode")
    run = compile_kernels.call("flash_decode", case.shape.options(), "gpu")
    lowered = jax.jit(run).trace(case.shape.operands()).lower(lowering_platforms=("cuda",))
    found = ahead_of_time.launches(lowered)
    assert found and all(launch.name.endswith("_kernel") for launch in found)
    assert 1024 < max(launch.shared_memory_bytes for launch in found) <= 232448  # what a block of an H100 may have


def test_a_kernel_for_tpu_is_compiled_and_recorded(monkeypatch, tmp_path):
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu (Linux on x86-64)")
    (case,) = kernel_cases.quick_cases("flash_decode")
    monkeypatch.setattr(compile_kernels, "cases", lambda only: [(only, "tiny", case.shape)])
    path = tmp_path / "result.json"
    compile_kernels.main(["--for", "tpu", "--kernel", "flash_decode", "--output", str(path)])
    records = json.loads(path.read_text())["records"]
    assert [record["for"] for record in records] == ["v5e", "v6e"]
    for record in records:
        assert 0 < record["kernels"][0]["vmem_bytes"] < 16 << 20
        assert record["memory"]["argument_bytes"] > 0 and record["compile_seconds"] > 0


def test_a_spill_or_an_error_makes_the_command_fail(monkeypatch, tmp_path, capsys):
    spilling, within_limits = (kernel | {"shared_memory_bytes": 2048} for kernel in ahead_of_time.read_ptxas(PTXAS))
    outcome = {"kernels": [within_limits]}
    monkeypatch.setattr(compile_kernels.ahead_of_time, "prepare", lambda backend: None)
    monkeypatch.setitem(compile_kernels.COMPILE, "gpu", lambda *_: {"compile_seconds": 1.0} | outcome)
    arguments = ["--for", "gpu", "--kernel", "flash_decode", "--output", str(tmp_path / "result.json")]
    compile_kernels.main(arguments)
    assert "FAILED" not in capsys.readouterr().out
    outcome["kernels"] = [within_limits, spilling]
    with pytest.raises(SystemExit, match="spills"):
        compile_kernels.main(arguments)

    def fail(*_):
        raise RuntimeError("ptxas: out of patience")

    monkeypatch.setitem(compile_kernels.COMPILE, "gpu", fail)
    with pytest.raises(SystemExit, match="does not compile"):
        compile_kernels.main(arguments)
    assert "out of patience" in json.loads((tmp_path / "result.json").read_text())["records"][0]["error"]


def test_a_missing_compiler_is_reported(monkeypatch):
    monkeypatch.setattr(ahead_of_time.importlib.util, "find_spec", lambda name: None)
    ahead_of_time._gpu.cache_clear()
    for backend, said in (("gpu", "gpu-compile"), ("tpu", "libtpu")):
        with pytest.raises(SystemExit, match=said):
            compile_kernels.main(["--for", backend])
