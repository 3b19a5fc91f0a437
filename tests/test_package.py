"""What gets installed: every folder, its data, nothing under a bare name; and what the README and CI promise."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import decodax

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_PACKAGED = {"build", "dist", "docs", "runs", "tests"}


def in_process(code, *, folder, path=()):
    """What a fresh process, started in this folder, prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_folders_are_importable_only_below_decodax(tmp_path):
    folders = [name.removeprefix("decodax.") for name in PROJECT["tool"]["setuptools"]["packages"] if name != "decodax"]
    code = f"""
import importlib, importlib.util
for name in {folders}:
    importlib.import_module("decodax." + name)
print([name for name in {folders} if "." not in name and importlib.util.find_spec(name)])
"""
    done = in_process(code, folder=tmp_path)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_no_folder_is_forgotten():
    """A folder with Python files is a package, and is on the list."""
    folders = {ROOT}
    for file in ROOT.rglob("*.py"):
        top = file.relative_to(ROOT).parts[0]
        if top not in NOT_PACKAGED and not top.startswith(".") and not (ROOT / top / "pyvenv.cfg").exists():
            folders.add(file.parent)
    assert all((folder / "__init__.py").is_file() for folder in folders)
    names = {".".join(("decodax", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert names == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_version_is_one():
    assert decodax.__version__ == PROJECT["project"]["version"] == importlib.metadata.version("decodax")


def test_the_type_checker_sees_every_folder_and_users_see_the_types():
    top = {name.split(".")[1] for name in PROJECT["tool"]["setuptools"]["packages"] if "." in name} - {"scripts"}
    assert top | {file.name for file in ROOT.glob("*.py")} == set(PROJECT["tool"]["pyright"]["include"])
    assert (ROOT / "py.typed").is_file()


def test_ci_runs_what_the_readme_says():
    readme, ci = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    for command in ('python -m pip install -e ".[test]"', "python -m pytest"):
        assert command in readme
        assert command in ci.replace("install -qq -e", "install -e")


@pytest.mark.slow
def test_a_wheel_holds_the_model_and_runs_elsewhere(tmp_path):
    source = tmp_path / "source"  # a build leaves folders in its source, which later builds would take up
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", *NOT_PACKAGED)
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path / "wheels", source], check=True, timeout=600)
    (wheel,) = (tmp_path / "wheels").glob("decodax-*.whl")
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True, timeout=600)
    arguments = ["decodax", "generate", "def f(x):", "--strategy", "draft_model", "--max-new-tokens", "3", "--json"]
    arguments.append("--no-compilation-cache")
    code = f"import decodax, sys; sys.argv = {arguments}; import decodax.cli; decodax.cli.main()"
    done = in_process(code, folder=tmp_path, path=[target])
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert Path(document["model"]["path"]).is_relative_to(target)
    assert len(document["tokens"][0]) == 3
    assert not [file for file in target.rglob("*.py") if file.relative_to(target).parts[0] != "decodax"]


def test_names_of_the_package_are_there_before_they_are_imported(tmp_path):
    code = (
        "import decodax, sys; print('jax' in sys.modules, set(decodax.__all__) <= set(dir(decodax))); "
        "from decodax import *; print(load is decodax.api.load, decodax.decoding is decoding); decodax.nonsense"
    )
    path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    done = in_process(code, folder=tmp_path, path=path)
    assert done.stdout == "False True\nTrue True\n"
    assert done.stderr.rstrip().endswith("AttributeError: module 'decodax' has no attribute 'nonsense'")


@pytest.mark.parametrize("name", ["decoding", "kernels_pallas", "layers", "models", "sharding"])
def test_packages_inside_are_there_without_an_import_of_their_own(tmp_path, name):
    path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    done = in_process(f"import decodax; print(decodax.{name}.__name__)", folder=tmp_path, path=path)
    assert (done.stdout, done.returncode) == (f"decodax.{name}\n", 0), done.stderr
