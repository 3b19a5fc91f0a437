"""Folders import each other in one direction, nothing private crosses a folder, and there are no import cycles."""

import subprocess
import sys

import pytest

from tests.imports import FOLDERS, Import, all_imports, folder_of, imports_of, sources


def upward(imports):
    """Imports of a folder above the importing one."""
    order = FOLDERS.index
    return [found for found in imports if order(folder_of(found.target)) > order(folder_of(found.module))]


def crosses_privately(found: Import):
    """Whether a private module, or a private name, is imported from outside its folder."""
    parts = found.target.split(".")
    hidden = next((i for i, part in enumerate(parts) if part.startswith("_") and part != "__main__"), None)
    if hidden is not None:
        return not f"{found.module}.".startswith(".".join(parts[:hidden]) + ".")
    is_private_name = found.name is not None and found.name.startswith("_") and not found.name.startswith("__")
    return is_private_name and found.target.rpartition(".")[0] != found.module.rpartition(".")[0]


def a_cycle(imports):
    """Modules that import each other in a cycle while they are imported, or None."""
    targets = {}
    for found in imports:
        if not found.late and not found.for_types and found.target != found.module:
            targets.setdefault(found.module, set()).add(found.target)
    finished: set[str] = set()

    def visit(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return None
        for target in sorted(targets.get(module, ())):
            ring = visit(target, [*path, module])
            if ring:
                return ring
        finished.add(module)
        return None

    return next((ring for module in sorted(targets) if (ring := visit(module, []))), None)


@pytest.fixture(scope="module")
def imports():
    return all_imports()


def test_folders_import_only_folders_below_them(imports):
    assert [found.place for found in upward(imports)] == []


def test_private_names_stay_in_their_folder(imports):
    assert [(found.place, found.target, found.name) for found in imports if crosses_privately(found)] == []


def test_there_are_no_import_cycles(imports):
    assert a_cycle(imports) is None


def planted(module, text):
    return list(imports_of(module, text, sources()))


@pytest.mark.parametrize(
    "text", ["from decodax.models import model", "def late():\n    from decodax.decoding.state import DecodeState"]
)
def test_an_upward_import_is_found(text):
    assert len(upward(planted("decodax.layers.norm", text))) == 1
    assert not upward(planted("decodax.planning.search", text))


@pytest.mark.parametrize(
    ("text", "is_private"),
    [
        ("from decodax.decoding.drafters._expand import draw_children", True),
        ("from decodax.decoding.drafters import _expand", True),
        ("from decodax.decoding.sampling import _hidden", False),  # of the same folder
        ("from decodax.models.model import _hidden", True),
        ("from decodax.decoding.drafters.hints import Hints", False),
    ],
)
def test_a_private_import_is_found(text, is_private):
    (found,) = planted("decodax.decoding.state", text)
    assert crosses_privately(found) == is_private


def test_a_cycle_is_found():
    there = planted("decodax.core.axes", "from decodax.core import pytree")
    back = planted("decodax.core.pytree", "from decodax.core.weight import Weight")
    closing = planted("decodax.core.weight", "import decodax.core.axes")
    assert a_cycle([*there, *back]) is None
    assert a_cycle([*there, *back, *closing]) == [
        f"decodax.core.{name}" for name in ("axes", "pytree", "weight", "axes")
    ]
    for_types = planted("decodax.core.weight", "if TYPE_CHECKING:\n    import decodax.core.axes")
    assert a_cycle([*there, *back, *for_types]) is None


MOST_MODULES = 60  # of ours: no strategy, drafter or kernel that is not used is among them


def test_plain_decoding_imports_what_it_uses_and_no_more():
    code = (
        "import sys, decodax.decoding.autoregressive; "
        "print(*sorted(name for name in sys.modules if name.split('.')[0] == 'decodax'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert "decodax.decoding.autoregressive" in names and len(names) <= MOST_MODULES, names
