"""The installed package has every folder and its data, and no bare names; README and CI agree with it."""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import decodax

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINKED = ("core", "decoding", "kernels_pallas", "layers", "models", "planning", "scripts", "sharding")


def in_process(code, *, folder, path=()):
    """What a fresh process, started in this folder, prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_only_decodax_is_importable_from_elsewhere(tmp_path):
    names = [
        path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path.is_dir() and path.stem.isidentifier())
    ]
    assert {"layers", "tests", "docs", "benchmarks"} <= set(names)
    code = f"""
import importlib.util, sys
print([name for name in {names} if importlib.util.find_spec(name)], 'decodax' in sys.modules)
import decodax
print([name for name in {names} if importlib.util.find_spec("decodax." + name)])
"""
    done = in_process(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[] False\n{[name for name in names if name in LINKED]}\n"


@pytest.mark.parametrize("name", LINKED)
def test_a_folder_imported_by_its_bare_name_is_refused_in_one_line(name):
    done = in_process(f"import sys; sys.path[:0] = ['.']; import {name}", folder=ROOT)
    assert done.stderr.splitlines()[-1] == f"ImportError: {name} is a part of decodax: import decodax.{name}"


def test_the_folder_of_the_package_links_to_every_folder_with_modules():
    package = ROOT / "src" / "decodax"
    links = {link.name: os.readlink(link) for link in package.iterdir() if link.is_symlink()}
    assert links == {name: f"../../{name}" for name in LINKED}
    with_modules = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert with_modules == set(LINKED), "a folder of the package has an __init__.py, and a link in src/decodax"
    folders = {path.parent for name in LINKED for path in (ROOT / name).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_there_is_one_version():
    assert decodax.__version__ == PROJECT["project"]["version"] == importlib.metadata.version("decodax")


def test_the_type_checker_sees_every_folder_and_users_see_the_types():
    checked = {"src/decodax", *(f"src/decodax/{name}" for name in LINKED if name != "scripts")}
    assert set(PROJECT["tool"]["pyright"]["include"]) == checked
    assert (ROOT / "src" / "decodax" / "py.typed").is_file()


# A Python 3.11 for .ci/run that only notes what it should do; a command with FAILING in it prints OUTPUT and fails.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
"-c import ensurepip"*) [[ $(basename "$0") == python3.11 && "$*" == *"(3, 11) <="* ]] ; exit ;;
"-c "*) echo venv311; exit ;;
"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit ;;
esac
printf '%s\\n' "$*" >>"$NOTES"
[[ -n "$FAILING" && "$*" == *"$FAILING"* ]] && { echo "$OUTPUT"; exit 1; }
[[ "$*" == *pytest* ]] && echo "3 passed in 1s"
exit 0
"""


def run_ci(folder, failing="", output=""):
    """Runs .ci/run in a folder without the project: how it ended, and the commands that it gave to Python."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(11, 15)), "../.ci/lint"):
        file = folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(STAND_IN if "python" in name else "#!/usr/bin/env bash\n", encoding="utf-8")
        file.chmod(0o755)
    notes = folder / "notes"
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "NOTES": str(notes),
        "FAILING": failing,
        "OUTPUT": output,
        "PYENV_ROOT": str(folder / "nowhere"),
    }
    done = subprocess.run([folder / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=120)
    return done, [shlex.split(line) for line in notes.read_text(encoding="utf-8").splitlines()]


def test_ci_runs_the_commands_of_the_readme(tmp_path):
    """First of all, in a fresh environment; added are only options that print less, or that demand more."""
    (line,) = (
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("python -m pip") and line.endswith("python -m pytest")
    )
    readme = [shlex.split(command)[1:] for command in line.split(" && ")]
    assert len(readme) == 2
    done, commands = run_ci(tmp_path)
    added = ("-qq", "--budget")
    assert [[word for word in command if word not in added] for command in commands[:2]] == readme
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{3 * sum('pytest' in command for command in commands)} passed, 0 failed"


@pytest.mark.parametrize(
    ("failing", "output", "last"),
    [
        ("--budget", "2 failed, 1 passed in 1s", "7 passed, 2 failed"),
        ("--sample", "Killed", "6 passed, 1 failed"),
        ("[lint]", "ERROR: no matching distribution", "9 passed, 1 failed"),
    ],
)
def test_ci_fails_where_a_step_does(tmp_path, failing, output, last):
    done, _ = run_ci(tmp_path, failing, output)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == last


@pytest.mark.slow
def test_a_wheel_holds_the_model_and_runs_elsewhere(tmp_path):
    source = tmp_path / "source"  # a build leaves folders in its source, which later builds would include
    ignored = shutil.ignore_patterns(
        ".*", "*.egg-info", "__pycache__", "build", "dist", "docs", "runs", "tests", "venv"
    )
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
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


def test_names_of_the_package_exist_before_they_are_imported(tmp_path):
    code = (
        "import decodax, sys; print('jax' in sys.modules, set(decodax.__all__) <= set(dir(decodax))); "
        "from decodax import *; print(load is decodax.api.load, decodax.decoding is decoding); decodax.nonsense"
    )
    path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    done = in_process(code, folder=tmp_path, path=path)
    assert done.stdout == "False True\nTrue True\n"
    assert done.stderr.rstrip().endswith("AttributeError: module 'decodax' has no attribute 'nonsense'")


@pytest.mark.parametrize("name", ["decoding", "kernels_pallas", "layers", "models", "sharding"])
def test_inner_packages_exist_without_their_own_import(tmp_path, name):
    path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    done = in_process(f"import decodax; print(decodax.{name}.__name__)", folder=tmp_path, path=path)
    assert (done.stdout, done.returncode) == (f"decodax.{name}\n", 0), done.stderr
