"""Signatures in `help()` of decodax hold nothing of this machine: neither the environment nor a path."""

import json
import os
import subprocess
import sys
from pathlib import Path

PLANTED = "planted-5f3a-in-the-environment"
# Every module is imported anew in a process whose environment holds the planted value, and all signatures, defaults of
# functions and fields, and constants of modules are written out.
WRITE_OUT = """
import contextlib, dataclasses, importlib, inspect, io, json, pkgutil
import decodax

def texts(owner, name):
    for key, value in sorted(vars(owner).items()):
        if inspect.isfunction(value) or inspect.isclass(value):
            if getattr(value, "__module__", "").split(".")[0] != "decodax":
                continue
            with contextlib.suppress(ValueError, TypeError):
                yield f"{name}.{key}", str(inspect.signature(value))
            if dataclasses.is_dataclass(value):
                yield f"{name}.{key}", repr([field.default for field in dataclasses.fields(value)])
            if inspect.isclass(value) and value is not owner:
                yield from texts(value, f"{name}.{key}")
        elif not inspect.ismodule(value):
            yield f"{name}.{key}", repr(value)

found = []
for module in pkgutil.walk_packages(decodax.__path__, "decodax."):
    skipped = (".tests", ".scripts", ".docs", ".__main__")
    if any(part in module.name for part in skipped):
        continue
    loaded = importlib.import_module(module.name)
    for name, text in texts(loaded, module.name):
        found.append((name, text))
print(json.dumps(found))
"""
# These hold the module's location, and what Python itself writes into it.
PYTHONS_OWN = ("__file__", "__path__", "__spec__", "__cached__", "__loader__", "__builtins__")


def test_no_signature_holds_the_environment_or_a_path_of_this_machine(tmp_path):
    home = tmp_path / "home-of-7c21"
    home.mkdir()
    environment = {**os.environ, "DECODAX_PLANTED": PLANTED, "HOME": str(home), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-P", "-c", WRITE_OUT]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [(name, text) for name, text in json.loads(done.stdout) if not name.endswith(PYTHONS_OWN)]
    assert len(found) > 1000 and any("distributed.start" in name and "environ" in text for name, text in found)
    secrets = (PLANTED, str(home), str(tmp_path), str(Path(__file__).resolve().parents[1]))
    assert [name for name, text in found if any(secret in text for secret in secrets)] == []
