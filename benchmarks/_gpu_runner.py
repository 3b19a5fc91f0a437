"""Runs checks in processes of their own, within a budget of time, and writes down each as it ends.

A check that raises, hangs or is killed costs no other check, and a run that is cut off has lost only what was running.
Nothing of JAX is imported here, so that the process that runs the checks holds no device.
"""

import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._json_file import write_json_file

ROOT = Path(__file__).parents[1]
LEAST_SECONDS = 5.0  # no check is started with less: starting Python, JAX and a device takes as long
FAILURES = ("failed", "raised", "timed out", "killed")
NO_RESULT = ("raised", "timed out", "killed", "refused", "skipped", "no time left")
_LAST_LINES, _LINE_CHARACTERS = 25, 400
_TURN_SECONDS = 0.05
_REAP_SECONDS = 5.0  # a process that hangs in a driver may not even be ended by SIGKILL


@dataclasses.dataclass(frozen=True)
class Check:
    """A process, and how long it may take.

    name: of its own among all checks.
    command: of the process, to which the path of a file is appended. The process writes its outcome there, a JSON
        object: "passed" (bool), or "refused" (why it was not tried); "line" (str, to print); and whatever it found.
    limit_s: seconds after which the process is killed.
    needs: the check without a result of which this one is skipped.
    alone: whether no other check may run beside it.
    may_time_out: whether reaching the limit says nothing.
    skip: why the check is not run at all; "" if it is.
    environment: variables of the process, besides those of this one.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    needs: str = ""
    alone: bool = False
    may_time_out: bool = False
    skip: str = ""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class _Child:
    """A check that runs."""

    def __init__(self, check: Check, folder: Path, left_s: float):
        self.check, self.limit_s = check, min(check.limit_s, left_s)
        self._outcome, self._log = folder / "outcome.json", folder / "log.txt"
        self._start, self._timed_out = time.monotonic(), False
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*check.command, str(self._outcome)],
                cwd=ROOT,
                env={**os.environ, **check.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts is ended with it
            )

    def has_ended(self) -> bool:
        """Whether the process has ended; ends it if it is past its limit."""
        if self._process.poll() is None and time.monotonic() - self._start > self.limit_s:
            self._timed_out = True
            self.kill()
        return self._timed_out or self._process.returncode is not None

    def kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(_REAP_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass

    def record(self) -> dict[str, Any]:
        seconds, code = time.monotonic() - self._start, self._process.returncode
        status, found = "raised", {}
        if self._timed_out:
            status = "timed out" if self.limit_s >= self.check.limit_s else "no time left"
            found["line"] = f"killed after {self.limit_s:.0f} s"
        elif code is not None and code < 0:
            status, found["line"] = "killed", f"by {signal.Signals(-code).name}"
        elif code:
            found["line"] = f"exit code {code}"
        else:
            found = self._read_outcome()
            passed = "passed" if found.get("passed") else "failed"
            status = "refused" if "refused" in found else passed
        record = {"name": self.check.name, "status": status, "seconds": round(seconds, 2), **found}
        if status in FAILURES or status == "no time left":
            lines = self._log.read_text(errors="replace").splitlines()
            record["last_lines"] = [line[:_LINE_CHARACTERS] for line in lines[-_LAST_LINES:]]
        if status == "timed out" and self.check.may_time_out:
            record["status"] = "no time left"
        return record

    def _read_outcome(self) -> dict[str, Any]:
        try:
            return json.loads(self._outcome.read_text())
        except (OSError, ValueError) as error:
            return {"passed": False, "line": f"it ended without an outcome: {error}"}


def run_checks(
    checks: Sequence[Check], output: Path, *, head: Mapping[str, Any], seconds: float, jobs: int = 1
) -> list[dict[str, Any]]:
    """Runs the checks in their order, and gives a record of each: name, status, seconds, and what the check found.

    Status: "passed"; "failed" (it ran, and says so); "raised", "timed out", "killed" (with the last lines of its
    output); "refused" (the kernel does not take the operands here); "skipped"; "no time left".

    output: of the records so far, valid JSON at any time.
    head: the rest of that file.
    seconds: for all of them.
    jobs: most checks that run at once.
    """
    start = time.monotonic()
    waiting, running = list(checks), list[_Child]()
    records: list[dict[str, Any]] = []

    def note(record: dict[str, Any]) -> None:
        records.append(record)
        write_json_file(output, {**head, "records": records})
        print(f"[{time.monotonic() - start:4.0f} s] {line(record)}", flush=True)

    write_json_file(output, {**head, "records": records})
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                for child in [child for child in running if child.has_ended()]:
                    running.remove(child)
                    note(child.record())
                if not waiting or not _may_start(waiting[0], [child.check for child in running], jobs):
                    time.sleep(_TURN_SECONDS)
                    continue
                check, left = waiting.pop(0), start + seconds - time.monotonic()
                kept_back = _kept_back(check, records, left)
                if kept_back:
                    note({"name": check.name, "seconds": 0.0, **kept_back})
                else:
                    own = Path(folder) / str(len(waiting))
                    own.mkdir()
                    running.append(_Child(check, own, left))
        finally:
            for child in running:
                child.kill()
    return records


def _may_start(check: Check, running: Sequence[Check], jobs: int) -> bool:
    """Whether a check may start beside those that run."""
    if any(other.alone or other.name == check.needs for other in running):
        return False
    return len(running) < (1 if check.alone else jobs)


def _kept_back(check: Check, records: Sequence[Mapping[str, Any]], left_s: float) -> dict[str, Any]:
    """Why a check is not run, as its record; empty if it is."""
    if check.skip:
        return {"status": "skipped", "line": check.skip}
    if left_s < min(LEAST_SECONDS, check.limit_s):
        return {"status": "no time left", "line": ""}
    status = next((record["status"] for record in records if record["name"] == check.needs), "passed")
    return {"status": "skipped", "line": f"{check.needs}: {status}"} if status in NO_RESULT else {}


def line(record: Mapping[str, Any]) -> str:
    """A record as a line."""
    found = f": {record['line']}" if record.get("line") else ""
    last = next((text.strip() for text in reversed(record.get("last_lines", [])) if text.strip()), "")
    return f"{record['status']:12} {record['name']} ({record['seconds']:.1f} s){found}{f' | {last}' if last else ''}"


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """How many checks have which status."""
    counts = Counter(record["status"] for record in records)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def end_on_sigterm() -> None:
    """Turns SIGTERM into an exception, so that the checks that run are ended, too."""

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def child_outcome(path: Path, run: Callable[[], dict[str, Any]], limit_s: float) -> None:
    """In the process of a check: writes the outcome of `run`, or why the kernel refuses.

    limit_s: of the check. A second before it, the stack of a process that hangs is printed.
    """
    import faulthandler

    faulthandler.enable()
    faulthandler.dump_traceback_later(max(limit_s - 1, 0.1))
    try:
        outcome = run()
    except NotImplementedError as unsupported_reason:
        outcome = {"refused": str(unsupported_reason), "line": str(unsupported_reason)}
    write_json_file(path, outcome)
