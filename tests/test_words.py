"""Words that were given up stay out, and files that texts name exist (docs/glossary.md has the words)."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Words without another meaning here: nowhere in code, documents or tests. What is said instead stands beside them.
NOWHERE = {
    r"laws?": "distribution, logprobs, probs",
    r"likeliest": "most probable, top-k, argmax",
    r"misfits?": "unsupported_reason, mismatch",
    r"guess(?:es|ed)?": "draft tokens, predictions",
    r"roll[ _-]calls?": "rendezvous",
    r"pending[ _]tokens?": "last token",
    r"trained[ _]parts?": "auxiliary weights",
    r"ways? to run": "dispatch algorithm",
    r"laid[ _]out": "sharding constraint, constrained",
    r"spoilt": "non-finite",
    r"scatter[ _]norms": "sequence parallelism",
}
# Words with a right use as well: not in public names, names of files and texts of errors.
NOT_IN_NAMES = {"letter", "letters", "witness", "offered", "joined", "seat", "seats", "greeting", "patience", "sound"}
NOT_IN_ERRORS = {"misfit", "wholes", "letter", "letters", "witness", "seat", "greeting", "sound"}
ALLOWED = {
    "LICENSE",  # "applicable law"
    "tests/test_words.py",
}
TEXTS = (".py", ".md", ".toml", ".yaml", ".yml", ".sbatch", "run", "lint")
PACKAGE = ("core", "decoding", "kernels_pallas", "layers", "models", "planning", "sharding", "src")


def tracked(*endings):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    names = [name for name in listed if name.endswith(endings) and name not in ALLOWED]
    return [name for name in names if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]


def given_up(text):
    """The words of NOWHERE in a text, with their lines; a part of a name (`draft_law`) counts."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for word, instead in NOWHERE.items():
            if re.search(rf"(?<![a-z]){word}(?![a-z])", line, re.IGNORECASE):
                found.append(f"{number}: {line.strip()[:80]!r} (say {instead})")
    return found


def words_of(name):
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)}


def public_names(text):
    """Names of functions, classes, their parameters and fields that begin without an underscore."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield from (argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
        if isinstance(node, ast.ClassDef):
            fields = (entry.target for entry in node.body if isinstance(entry, ast.AnnAssign))
            yield from (field.id for field in fields if isinstance(field, ast.Name))


def error_texts(text):
    """The texts that `raise` statements hold."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def test_words_that_were_given_up_are_nowhere():
    found = {name: given_up((ROOT / name).read_text("utf-8")) for name in tracked(*TEXTS)}
    assert {name: places for name, places in found.items() if places} == {}


def test_public_names_files_and_errors_use_the_words_of_the_glossary():
    wrong = []
    for name in tracked(".py"):
        if not name.startswith(PACKAGE):
            continue
        text = (ROOT / name).read_text("utf-8")
        names = [name.rpartition("/")[2].removesuffix(".py"), *public_names(text)]
        wrong += [f"{name}: {own}" for own in names if not own.startswith("_") and words_of(own) & NOT_IN_NAMES]
        wrong += [f"{name}: {said!r}" for said in error_texts(text) if words_of(said) & NOT_IN_ERRORS]
    assert wrong == []


@pytest.mark.parametrize("text", ["the law of a token", "draft_laws = 1", "Likeliest", "a roll-call", "trained_part"])
def test_a_given_up_word_is_found(text):
    assert len(given_up(f"one line\n{text}\n")) == 1


@pytest.mark.parametrize("text", ["a flaw", "lawn", "misfitting", "the last token"])
def test_other_words_are_not(text):
    assert given_up(text) == []


def test_a_given_up_word_in_a_name_or_an_error_is_found():
    text = "def mesh_axes(letter): raise ValueError(f'{letter} is no letter')\nclass Joined:\n    seats: int\n"
    assert {name for name in public_names(text) if words_of(name) & NOT_IN_NAMES} == {"letter", "Joined", "seats"}
    assert [said for said in error_texts(text) if words_of(said) & NOT_IN_ERRORS] == [" is no letter"]


FOREIGN = ("medusa/", "prompt/")  # paths in repositories of papers
NAMED = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.py)`")


def missing_files(name, text, files):
    """Python files that a text names in backticks and that are not there: below the root, beside it, or anywhere."""
    for found in NAMED.findall(text):
        here = str(Path(name).parent / found)
        if not found.startswith(FOREIGN) and not any(
            file in (found, here) or file.endswith("/" + found) for file in files
        ):
            yield found


def test_files_that_texts_name_are_there():
    files = [*tracked(".py"), *ALLOWED]
    found = {name: list(missing_files(name, (ROOT / name).read_text("utf-8"), files)) for name in tracked(".py", ".md")}
    assert {name: missing for name, missing in found.items() if missing} == {}
    assert list(missing_files("core/axes.py", "see `core/axes.py`, `axes.py`, `nowhere.py`", files)) == ["nowhere.py"]
