"""Counts the files and lines of decodax that run for one prompt, from `load` to the last token.

    python -m benchmarks.files_read                         one greedy prompt with the embedded model, on one device
    python -m benchmarks.files_read --strategy draft_model  a run with drafts

A file counts, with all its lines, if a function that it defines is called, tracing included. Code that runs when a
module is imported does not count, nor what an annotation or a default evaluates there.
"""

import argparse
import os
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import decodax

PACKAGE = Path(decodax.__file__).resolve().parent


def root_of(package: Path) -> Path:
    """The folder below which all modules of the package are: links in it lead to folders at the root."""
    return package.parent.parent if package.parent.name == "src" else package


class CalledFiles:
    """The files whose functions are called within a `with` block, by name relative to the root."""

    def __init__(self) -> None:
        self.root = str(root_of(PACKAGE)) + os.sep
        self.called: set[str] = set()
        self._known: set[CodeType] = set()

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code not in self._known:
            path = os.path.realpath(code.co_filename) if os.path.isabs(code.co_filename) else ""
            is_ours = path.startswith(self.root) and path != os.path.realpath(__file__)
            self._known.add(code)
            if is_ours and not self._at_import(frame):
                self.called.add(path.removeprefix(self.root))

    @staticmethod
    def _at_import(frame: FrameType | None) -> bool:
        """Whether the call is a module's body, or made by one while it is imported."""
        while frame is not None:
            if frame.f_code.co_name == "<module>" and not frame.f_code.co_filename.endswith(Path(__file__).name):
                return True
            if frame.f_code.co_filename.startswith("<frozen runpy"):
                return False
            frame = frame.f_back
        return False

    def __enter__(self) -> "CalledFiles":
        threading.setprofile(self._see)
        sys.setprofile(self._see)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def lines(self) -> dict[str, int]:
        """Of each file, its number of lines."""
        return {name: len(Path(self.root, name).read_text("utf-8").splitlines()) for name in sorted(self.called)}


def count(strategy: str | None = None) -> dict[str, int]:
    """The lines of each file that runs for one greedy prompt, 16 new tokens, on one device."""
    with CalledFiles() as files:
        lm = decodax.load()
        decodax.generate(lm, ["def fib(n):"], max_new_tokens=16, strategy=strategy)
    return files.lines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", help="a strategy of `decodax methods`; plain decoding by default")
    lines = count(parser.parse_args().strategy)
    for name, number in lines.items():
        print(f"{number:6} {name}")
    print(f"{sum(lines.values()):6} lines in {len(lines)} files")


if __name__ == "__main__":
    main()
