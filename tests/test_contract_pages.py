"""The pages of docs/contracts/ are complete, and the example of each runs as it stands."""

import ast
import re
from pathlib import Path

import pytest

from tests.imports import FOLDERS, imports_of, sources

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "contracts"
PAGES = sorted(path.name for path in FOLDER.glob("*.md") if path.name != "README.md")
INDEXES = ("docs/contracts/README.md", "docs/concepts/extending.md")
CONTRACTS = sorted(
    path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("contract.py")
)
each_page = pytest.mark.parametrize("page", PAGES)


def text_of(page):
    return (FOLDER / page).read_text("utf-8")


def example_of(page):
    """The example, and what it is compiled from."""
    (block,) = re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)
    return block


def links(text):
    """The files that a document links to, without anchors."""
    return [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


@pytest.mark.slow
@each_page
def test_the_example_runs(page):
    exec(compile(example_of(page), page, "exec"), {"__name__": page})


@each_page
def test_the_example_ends_with_what_it_shows(page):
    last = ast.parse(example_of(page)).body[-1]
    assert isinstance(last.body[-1] if isinstance(last, ast.For) else last, ast.Assert)


@each_page
def test_the_example_imports_only_public_names(page):
    imports = list(imports_of(page, example_of(page), sources()))
    parts = [part for found in imports for part in (*found.target.split("."), found.name or "")]
    assert imports and not [part for part in parts if part.startswith("_")]
    assert not re.search(r"\.tests?\b|import tests", example_of(page))


@each_page
def test_a_page_names_its_contract_and_a_test_that_checks_it(page):
    named = re.findall(r"`([\w/-]+\.py)`", text_of(page))
    assert named and not [name for name in named if not (ROOT / name).is_file()]
    assert any(name in CONTRACTS for name in named)
    assert any(name.startswith("tests/contracts/test_") for name in named)


@each_page
def test_a_page_is_short(page):
    lines = text_of(page).splitlines()
    assert len(lines) <= 70 and max(map(len, lines)) <= 120


def test_every_contract_has_a_page():
    """Or is among those that extending.md says in a line."""
    texts = [*map(text_of, PAGES), (ROOT / INDEXES[1]).read_text("utf-8")]
    named = {name for text in texts for name in re.findall(r"`([\w/-]+\.py)`", text)}
    assert [contract for contract in CONTRACTS if contract not in named] == []


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_links_every_page(index):
    here = (ROOT / index).parent
    targets = [(here / target).resolve() for target in links((ROOT / index).read_text("utf-8"))]
    assert [target for target in targets if not target.exists()] == []
    assert [page for page in PAGES if FOLDER / page not in targets] == []


@each_page
def test_links_of_a_page_lead_somewhere(page):
    assert [target for target in links(text_of(page)) if not (FOLDER / target).exists()] == []
