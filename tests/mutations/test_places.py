"""Planted bugs are real: each kind changes the code as it says, at places that a seed picks, and nothing else."""

import ast
from pathlib import Path

import pytest

from tests.mutations import __main__ as run
from tests.mutations.__main__ import select_tests
from tests.mutations.places import FOLDERS, mutations_of, pick, planted

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''"""A docstring with 7."""

from typing import TYPE_CHECKING


def f(x: "Array[3]", n: int = 5) -> int:
    if n < 0:
        raise ValueError(f"n must be at least {0}")
    mask = (x > 1) & ~(x == n)
    total = jnp.where(mask, x - 1, -x).astype(jnp.float32)
    total = total * 2
    total += n
    return jnp.minimum(total, 9) if n and mask else total
'''


@pytest.fixture
def root(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE)
    return tmp_path


def test_every_kind_is_found_once_or_more_and_changes_what_it_says(root):
    found = mutations_of(root, "a.py")
    kinds = {bug.kind for bug in found}
    assert {"< -> <=", "> -> >=", "& -> |", "Invert dropped", "== -> !=", "- -> +", "* -> +"} <= kinds
    assert {"branches of where swapped", "float32 -> bfloat16", "line dropped", "minimum -> maximum"} <= kinds
    assert {"and -> or", "USub dropped", "5 -> 6", "9 -> 10"} <= kinds
    assert "7 -> 8" not in kinds and "3 -> 4" not in kinds  # a docstring and an annotation
    original = ast.unparse(ast.parse(SOURCE)) + "\n"
    texts = [planted(SOURCE, bug) for bug in found]
    assert original not in texts and len(set(texts)) == len(texts)
    for text in texts:
        changed = [pair for pair in zip(original.splitlines(), text.splitlines(), strict=True) if pair[0] != pair[1]]
        assert len(changed) == 1, text


def test_a_seed_picks_the_same_places_in_different_files():
    first, again, other = pick(ROOT, 7, 40), pick(ROOT, 7, 40), pick(ROOT, 8, 40)
    assert first == again != other
    assert len({bug.file for bug in first}) == 40 and all(bug.file.split("/")[0] in FOLDERS for bug in first)
    for bug in first[:10]:
        compile(planted((ROOT / bug.file).read_text("utf-8"), bug), bug.file, "exec")


def test_the_tests_named_after_a_file_come_first():
    named, folder, everything = select_tests(ROOT, "decoding/drafters/kangaroo.py")
    assert "tests/decoding/drafters/test_kangaroo.py" in named
    assert folder == ["tests/decoding/drafters"] and everything == ["tests"]


def test_a_test_that_fails_without_the_bug_catches_nothing(root, monkeypatch):
    source = (root / "a.py").read_text()
    broken = []
    monkeypatch.setattr(run, "select_tests", lambda root, file: [["tests"]])
    has_bug = lambda: (root / "a.py").read_text() != source

    def first_failure(root, arguments, workers):
        if arguments == ["t.py::asks_git"] or "t.py::asks_git" not in arguments:
            failed = "t.py::asks_git" if arguments != ["t.py::right"] else "t.py::right" if has_bug() else None
        else:
            failed = "t.py::right" if has_bug() else None
        return failed and f"FAILED {failed} - assert"

    monkeypatch.setattr(run, "first_failure", first_failure)
    (bug, *_) = mutations_of(root, "a.py")
    assert run.caught_by(bug, root, "0", broken) == "FAILED t.py::right - assert"
    assert broken == ["t.py::asks_git"] and not has_bug()
