"""Logits in float32 are as near to those in float64 as the golden ones, which transformers computed in float32."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_float32_is_as_exact_as_the_reference():
    """One case of each kind of layer: recurrent with a delta rule, lightning, latent attention, experts, dense.

    Rounding errors differ by order of summation only; a method that loses digits would lose them in every layer.
    """
    names = ("qwen3_next", "minimax", "deepseek_v3", "qwen3_moe", "llama")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.models.float64_logits", *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == list(names)
    for name, errors in found.items():
        assert 0 < errors["ours"] < 3 * errors["golden"] < 3 * 2e-4, name
