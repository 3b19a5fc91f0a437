"""Collects text that comes with every Python: the standard library's own source, split for training and evaluation.

The running interpreter's `Lib` folder (licence: PSF-2.0) is read file by file, tests included. Tables that a program
wrote (code pages, Unicode properties, build settings) and files that are not UTF-8 are left out, near-duplicates are
dropped, and whole packages are held out together with their tests: a model is then evaluated on code whose neighbours
it has never seen. Nothing is downloaded, and two calls on one interpreter give the same documents in the same order.

    python -m decodax.scripts.demo_corpus          # what there is, in numbers
"""

import ast
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Chosen for being ordinary, well-written Python of middle length; about 6 % of the code that is not tests.
HELDOUT_PACKAGES = frozenset(
    [
        "argparse",
        "calendar",
        "configparser",
        "contextlib",
        "csv",
        "dataclasses",
        "fractions",
        "json",
        "pathlib",
        "shlex",
        "statistics",
        "textwrap",
        "tomllib",
        "zipfile",
    ]
)
# Tables and data written by programs rather than people. `lib2to3/tests/data` and `test/encoded_modules` are inputs in
# strange encodings and dialects.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"})
EXCLUDED_PREFIXES = ("_sysconfigdata", "lib2to3/tests/data/", "test/encoded_modules/", "test/tokenizedata/", "test/bad")

SHINGLE_LINES = 5
MAX_SEEN_SHARE = 0.5  # of a file's shingles, in earlier files of its split
MAX_LEAKED_SHARE = 0.1  # of a held-out file's shingles, in the training split
MIN_LETTER_SHARE = 0.4  # of the visible characters; tables of numbers fall below
MIN_CHARACTERS, MAX_CHARACTERS = 200, 400_000


@dataclass(frozen=True)
class Document:
    """One source file.

    path: below `Lib`.
    package: the one it belongs to.
    is_test: whether it is test code.
    """

    path: str
    package: str
    text: str
    is_test: bool


@dataclass(frozen=True)
class Corpus:
    """The documents of each split.

    train, heldout: in path order.
    dropped: how many files were left out, by reason.
    """

    train: list[Document]
    heldout: list[Document]
    dropped: dict[str, int] = field(default_factory=dict)


def package_of(path: str) -> str:
    """The package that a file below `Lib` belongs to; a test belongs to what it tests.

    >>> package_of("json/decoder.py"), package_of("test/test_json/test_dump.py"), package_of("_pydecimal.py")
    ('json', 'json', 'pydecimal')
    """
    parts = Path(path).with_suffix("").parts
    if parts[0] == "test" and len(parts) > 1:
        tested = parts[1].strip("_").removeprefix("test_")
        # csv_tests.py and test_dataclasses_helper.py follow csv and dataclasses.
        owner = next((name for name in sorted(HELDOUT_PACKAGES) if tested.startswith(name)), tested)
        return owner or "test"
    return parts[0].strip("_") or parts[0]


def is_test(path: str) -> bool:
    """Whether the file is test code: below a folder of tests, or named like a test."""
    parts = Path(path).parts
    return bool({"test", "tests", "idle_test"} & set(parts[:-1])) or parts[-1].startswith("test_")


def shingles(text: str) -> set[bytes]:
    """Hashes of all runs of five lines, without blank lines and indentation: two copies of a text share them."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    runs = range(max(1, len(lines) - SHINGLE_LINES + 1))
    return {hashlib.blake2b("\n".join(lines[i : i + SHINGLE_LINES]).encode(), digest_size=8).digest() for i in runs}


def _python_files(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - EXCLUDED_FOLDERS
        yield from ((Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py"))


def _read(root: Path, dropped: dict[str, int]) -> Iterator[Document]:
    for path in sorted(_python_files(root)):
        file = root / path
        if path.startswith(EXCLUDED_PREFIXES):
            dropped["foreign data"] += 1
            continue
        try:
            text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            dropped["not UTF-8"] += 1
            continue
        visible = len("".join(text.split()))
        if not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
            dropped["too short or too long"] += 1
        elif sum(map(str.isalpha, text)) < MIN_LETTER_SHARE * visible:
            dropped["table of numbers"] += 1
        else:
            yield Document(path, package_of(path), text, is_test(path))


def collect(root: Path | None = None) -> Corpus:
    """Reads and splits the Python files below `root` (default: the running interpreter's standard library).

    A file is dropped when half of its five-line shingles are in earlier files of its own split, and a held-out file
    when a tenth of them is anywhere in the training split. Code is read before tests, and kept.
    Raises ValueError when there is no Python file below `root`.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else Path(root)
    reasons = ("foreign data", "not UTF-8", "too short or too long", "table of numbers")
    dropped = dict.fromkeys((*reasons, "near-duplicate", "held-out seen in training"), 0)
    documents = sorted(_read(root, dropped), key=lambda document: document.is_test)
    if not documents:
        raise ValueError(
            f"expected Python source files below {root}, found none; install the standard library's source"
        )

    def distinct(candidates: list[Document], foreign: set[bytes]) -> tuple[list[Document], set[bytes]]:
        kept: list[Document] = []
        seen: set[bytes] = set()
        for document in candidates:
            own = shingles(document.text)
            if len(own & foreign) > MAX_LEAKED_SHARE * len(own):
                dropped["held-out seen in training"] += 1
            elif len(own & seen) > MAX_SEEN_SHARE * len(own):
                dropped["near-duplicate"] += 1
            else:
                kept.append(document)
                seen |= own
        return sorted(kept, key=lambda document: document.path), seen

    train, seen_in_training = distinct([d for d in documents if d.package not in HELDOUT_PACKAGES], set())
    heldout, _ = distinct([d for d in documents if d.package in HELDOUT_PACKAGES], seen_in_training)
    return Corpus(train, heldout, dropped)


def heldout_prompts(count: int, *, corpus: Corpus | None = None, context_lines: int = 16) -> list[str]:
    """`count` prompts for measuring decoding: starts of functions from held-out code, never seen in training.

    Each prompt is the `def` line with its decorators and up to `context_lines` lines before it, and ends after the
    colon. The functions (six lines or longer) are spread evenly over all held-out files that are not tests.
    Raises ValueError when `count` is not in 1..number of such functions.
    """
    prompts = []
    for document in (collect() if corpus is None else corpus).heldout:
        if document.is_test:
            continue
        lines = document.text.splitlines(keepends=True)
        functions = [n for n in ast.walk(ast.parse(document.text)) if isinstance(n, ast.FunctionDef)]
        for node in sorted(functions, key=lambda node: node.lineno):
            first_of_body = node.body[0].lineno
            if node.end_lineno - node.lineno >= 5 and first_of_body > node.lineno:
                start = max(0, node.lineno - 1 - context_lines)
                end = first_of_body - 1
                while not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#"):
                    end -= 1
                prompts.append("".join(lines[start:end]).rstrip("\n"))
    if not 1 <= count <= len(prompts):
        raise ValueError(f"count must be in 1..{len(prompts)} (functions in the held-out files), got {count}")
    return [prompts[i * len(prompts) // count] for i in range(count)]


def summary(corpus: Corpus) -> dict:
    """Files, bytes and packages of each split, and the files dropped by reason."""

    def numbers(documents: list[Document]) -> dict[str, int]:
        return {"files": len(documents), "bytes": sum(len(d.text.encode()) for d in documents)}

    splits = {"train": corpus.train, "heldout": corpus.heldout}
    kinds = {"code": False, "tests": True}
    table: dict = {
        f"{split} {kind}": numbers([d for d in documents if d.is_test == flag])
        for split, documents in splits.items()
        for kind, flag in kinds.items()
    }
    return table | {"heldout packages": sorted({d.package for d in corpus.heldout}), "dropped": corpus.dropped}


if __name__ == "__main__":
    print(json.dumps(summary(collect()), indent=2))
