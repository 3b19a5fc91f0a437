"""Runs cases in a process of their own, so that a case that ends or blocks the process is named.

The process prints each case's name before it runs it and the verdict after it. Where it dies or stays silent, the
last named case is to blame, and a new process continues after it.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tests.fuzz.verdict import SECONDS, WALL_FACTOR, Outcome, Report, Verdict

_ROOT = Path(__file__).parents[2]
COMMAND = ("-m", "tests.fuzz.isolated")  # what Python runs, with the subject and a file of the names
START_SECONDS = 120.0  # for starting JAX and listing the cases, on a busy machine
SILENT_SECONDS = 15 + 3 * WALL_FACTOR * SECONDS  # loading an undamaged model may come before a case


def judge_isolated(subject: str, names: Sequence[str]) -> Report:
    """The verdicts on these cases of a subject."""
    verdicts: list[Verdict] = []
    while len(verdicts) < len(names):
        verdicts += _one_process(subject, names[len(verdicts) :])
    return Report(tuple(verdicts))


def _one_process(subject: str, names: Sequence[str]) -> list[Verdict]:
    """Verdicts on these cases up to the first that ends the process."""
    verdicts, started = [], None
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryFile() as errors:
        listed = Path(work, "names.json")
        listed.write_text(json.dumps(list(names)))
        process = subprocess.Popen(
            [sys.executable, *COMMAND, subject, str(listed)],
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert process.stdout is not None
        try:
            for line in _lines(process.stdout):
                said = json.loads(line)
                if "outcome" in said:
                    verdicts.append(Verdict(said["name"], Outcome(said["outcome"]), said["said"]))
                    started = None
                else:
                    started = said["name"]
            how = _end_of(process)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if len(verdicts) < len(names):
            if started is None and not verdicts:
                errors.seek(0)
                raise RuntimeError(f"the cases could not be started:\n{errors.read().decode()[-2000:]}")
            verdicts.append(Verdict(started or names[len(verdicts)], Outcome.WRONG, how))
    return verdicts


def _end_of(process: subprocess.Popen[bytes]) -> str:
    """How the process ended, or that it did not."""
    try:
        return f"ended the process with code {process.wait(1)}"
    except subprocess.TimeoutExpired:
        return "fell silent"


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines that a process prints, until it ends or prints nothing for too long."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        patience = START_SECONDS
        while selector.select(patience):
            said, patience = os.read(stream.fileno(), 2**16), SILENT_SECONDS
            if not said:
                return
            *lines, rest = (rest + said).split(b"\n")
            yield from (line.decode() for line in lines)


def _main(subject: str, listed: str) -> None:
    from tests import conftest  # noqa: F401 (the session's settings, before JAX starts)
    from tests.fuzz.subjects import SUBJECTS
    from tests.fuzz.verdict import judge

    names = json.loads(Path(listed).read_text())
    cases = {case.name: case for case in SUBJECTS[subject].cases(Path(listed).parent)}
    for name in names:
        print(json.dumps({"name": name}), flush=True)
        verdict = judge(cases[name])
        print(json.dumps({"name": name, "outcome": verdict.outcome.value, "said": verdict.said}), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
