"""Plants bugs, one at a time, and sees whether the quick suite catches them.

    python -m tests.mutations --seed 7 --count 40 --out tests/mutations/results_7.json

Each bug goes into a copy of the checkout, where the tests run until the first one fails: those named after the file or
its contract, then those of its folder, then all. A test that fails in the copy without the bug, too, catches nothing. A
bug that lives is listed with its place; one that changes nothing is replaced by hand in EQUIVALENT, with the reason.
Goes on where it was interrupted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.mutations.places import Mutation, pick, planted

ROOT = Path(__file__).resolve().parents[2]
# Bugs that change no result, and why: (file, line, kind).
EQUIVALENT: dict[tuple[str, int, str], str] = {}


def select_tests(root: Path, file: str) -> list[list[str]]:
    """Names of tests in the order of hope: those named after the file or its contract, those of its folder, all."""
    stem, contract = Path(file).stem.strip("_"), f"contracts/test_{Path(file).parent.name}.py"
    paths = (*sorted((root / "tests").rglob(f"test_*{stem}*.py")), *(root / "tests").glob(contract))
    named = [str(path.relative_to(root)) for path in dict.fromkeys(paths)]
    folder = root / "tests" / Path(file).parent
    while not folder.is_dir():
        folder = folder.parent
    return [part for part in (named, [str(folder.relative_to(root))], ["tests"]) if part]


def caught_by(mutation: Mutation, root: Path, workers: str, broken: list[str]) -> str | None:
    """The test that fails first with the bug in the copy at `root`; None where none does.

    broken: tests that fail in the copy without a bug, too, and are left out; those found are added.
    """
    path = root / mutation.file
    text = path.read_text("utf-8")

    def failure(source: str, tests: list[str]) -> str | None:
        path.write_text(source, "utf-8")
        left_out = [word for test in broken for word in ("--deselect", test)]
        return first_failure(root, [*tests, *left_out], workers)

    try:
        for tests in select_tests(root, mutation.file):
            while (failed := failure(planted(text, mutation), tests)) is not None:
                named = failed.startswith(("FAILED ", "ERROR "))  # a name may hold spaces
                test = failed.split(" ", 1)[1].split(" - ")[0] if named else tests[0]
                if failure(text, [test]) is None:
                    return failed
                broken.append(test)
        return None
    finally:
        path.write_text(text, "utf-8")


def first_failure(root: Path, arguments: list[str], workers: str) -> str | None:
    """pytest's line of the first test that fails in the checkout at `root`; None where none does."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-n", workers]
    done = subprocess.run([*command, *arguments], cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode in (0, 5):  # 5: no quick test is among them
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else (done.stdout + done.stderr).strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", default="2")
    asked = parser.parse_args()
    results = json.loads(asked.out.read_text("utf-8")) if asked.out.exists() else []
    broken: list[str] = []
    known = {(found["file"], found["line"], found["kind"]) for found in results}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkout"
        shutil.copytree(ROOT, root, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        for mutation in pick(ROOT, asked.seed, 4 * asked.count):
            place = (mutation.file, mutation.line, mutation.kind)
            if len(results) >= asked.count:
                break
            if place in known or place in EQUIVALENT:
                continue
            start = time.monotonic()
            caught = caught_by(mutation, root, asked.workers, broken)
            results.append(asdict(mutation) | {"caught_by": caught, "seconds": round(time.monotonic() - start)})
            asked.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(
                f"{'lives ' if caught is None else 'caught'} {mutation.file}:{mutation.line} {mutation.kind}",
                flush=True,
            )
    print(f"{sum(found['caught_by'] is not None for found in results)} of {len(results)} caught")


if __name__ == "__main__":
    main()
