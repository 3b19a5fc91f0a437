"""Reruns single cases and shows what they raise: python -m tests.fuzz.again NAME... (a substring is enough)."""

import sys
import tempfile
import traceback
from pathlib import Path

from tests import conftest  # noqa: F401 (the session's settings, before JAX starts)
from tests.fuzz.subjects import SUBJECTS
from tests.fuzz.verdict import judge


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            cases = SUBJECTS[name.split("/")[0]].cases(Path(work))
            for case in (case for case in cases if name in case.name):
                verdict = judge(case)
                print(f"{verdict.outcome.value}: {verdict.name}\n    {verdict.said}")
                try:
                    case.act()
                except BaseException:
                    traceback.print_exc()


if __name__ == "__main__":
    main(sys.argv[1:])
