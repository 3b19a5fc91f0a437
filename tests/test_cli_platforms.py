"""Commands do not start libtpu where there is no TPU, and change nothing where there is one, or a GPU."""

import os
import subprocess
import sys

import pytest

from decodax.cli import platforms


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Sets what is installed; gives what JAX_PLATFORMS is then, on a machine whose system folders are in tmp_path."""
    for name in [name for name in os.environ if name.startswith(("TPU_", "JAX_PLATFORMS"))]:
        monkeypatch.delenv(name)
    (tmp_path / "bus" / "0").mkdir(parents=True)
    (tmp_path / "bus" / "0" / "vendor").write_text("0x8086\n")
    (tmp_path / "dev").mkdir()

    def platforms_of(*installed):
        monkeypatch.setattr(platforms, "find_spec", lambda name: name if name in installed else None)
        platforms.leave_out_absent_tpus(tmp_path / "dev", tmp_path / "bus")
        return os.environ.get("JAX_PLATFORMS")

    return platforms_of


def test_libtpu_is_left_out_where_there_is_no_tpu(system):
    assert system() is None
    assert system("libtpu", "jax_cuda12_plugin") is None  # JAX would fail where the plug-in finds no GPU
    assert system("libtpu") == "cpu"


def test_what_the_user_chose_stays(system, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert system("libtpu") == "tpu,cpu"


@pytest.mark.parametrize("file", ["dev/accel0", "dev/vfio/3", "bus/1/vendor"])
def test_a_tpu_is_seen_by_its_files(system, tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("0x1ae0\n")
    assert system("libtpu") is None


def test_a_tpu_is_seen_by_its_environment(system, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert system("libtpu") is None


def test_a_command_prints_nothing_of_libtpu():
    pytest.importorskip("libtpu", reason="without it there is nothing to start (Linux on x86-64)")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TPU_"))}
    command = [sys.executable, "-m", "decodax", "bench", "--kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
