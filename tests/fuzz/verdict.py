"""Runs a case and judges it: right, refused with a clear message, or wrong, and then why.

A clear message belongs to an error that the library promises: one line (or a line and a list), printable, which names
the file and the field or option that the user gave, and no name internal to the code. Everything else is wrong:
another kind of error, a loaded model that is not the one described, more time or memory than a bound.

Cases run without the session's checks of annotations, which would run before the library's own.
"""

import contextlib
import enum
import json
import re
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import jax
import jaxtyping

from decodax.models.checkpoints.model_files import UnreasonableFileError

SECONDS = 5.0  # of the processor for one case; a tiny model loads in less than 0.1
WALL_FACTOR = 4  # wall-clock seconds per second of processor time, since the machine may be busy
MAX_GROWTH_BYTES = 2**28  # of the process's memory in one case; a tiny checkpoint has less than a megabyte
ADDRESS_SPACE_BYTES = (
    2**30
)  # beyond what the process has, in one case; threads and compilers reserve more than they use
_MAX_LINES, _MAX_CHARACTERS = 24, 3_000

PROMISED = (
    *(ValueError, UnreasonableFileError, NotImplementedError),
    *(FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError),
)
# Phrases of errors of Python, of libraries or of internal code, which no message for users has.
_INNER = re.compile(
    r"object at 0x|<class '|NoneType|unhashable|not subscriptable|has no attribute|not iterable|unsupported operand"
    r"|Error\(|Traceback|Errno|jaxtyping|0x7f|site-packages|\.py\b"
)
_TESTS = Path(__file__).parents[1]
_WORD = re.compile(r"(?<![\\\w])[A-Za-z]\w*")  # not the rest of an escape
# Words of the formats: transformers' activations, safetensors' types of numbers and its index, tokenizer files.
_OF_FORMATS = frozenset(
    [
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "F4_E2M1",
        "F6_E2M3",
        "F6_E3M2",
        "F8_E4M3",
        "F8_E4M3FNUZ",
        "F8_E5M2",
        "F8_E5M2FNUZ",
        "F8_E8M0",
        "weight_map",
        "data_offsets",
        "total_size",
        "__metadata__",
        "tokenizer_config",
        "special_tokens_map",
        "added_tokens",
        "generation_config",
        "eos_token_id",
        "max_length",
        "pad_to_multiple_of",
        "pad_type_id",
        "pad_token",
        "pad_id",
        "single_word",
    ]
)


class WrongResult(AssertionError):  # noqa: N818 (what it says is the verdict)
    """Something was accepted that should not have been, or has a wrong result."""


class TimeUp(BaseException):
    """A case has run longer than SECONDS; not an Exception, which the library might catch."""


class Outcome(enum.Enum):
    RIGHT = "right"
    REFUSED = "refused"
    WRONG = "wrong"


@dataclass(frozen=True)
class Case:
    """One try.

    name: subject first, then all that is needed to make the case again.
    act: runs it; raises WrongResult where the result is wrong, and lets every other error pass.
    named: what the message of a refusal must name, one word of each group.
    may_kill: it could end or block the process if it is not handled, so it runs in a process of its own.
    promised: the kinds of errors that a refusal may have.
    given: what the user gave, whose words a message may quote; a function that makes it where that is slow.
    seconds: of processor time; by the clock it has WALL_FACTOR times as many.
    """

    name: str
    act: Callable[[], None]
    named: tuple[tuple[str, ...], ...] = ()
    may_kill: bool = False
    promised: tuple[type[BaseException], ...] = PROMISED
    given: bytes | Callable[[], bytes] = b""
    seconds: float | None = None

    @property
    def given_text(self) -> str:
        given = self.given if isinstance(self.given, bytes) else self.given()
        return given.decode(errors="replace")


@dataclass(frozen=True)
class Verdict:
    """said: the message of a refusal, or what is wrong."""

    name: str
    outcome: Outcome
    said: str = ""


def judge(case: Case) -> Verdict:
    """Runs a case."""
    jax.devices()  # its threads start before memory is limited
    before, start = peak_bytes(), time.monotonic()
    try:
        with _memory_limit(ADDRESS_SPACE_BYTES), _time_limit(case.seconds or SECONDS), _as_users_run():
            case.act()
        verdict = Verdict(case.name, Outcome.RIGHT)
    except KeyboardInterrupt:
        raise
    except WrongResult as wrong:
        verdict = Verdict(case.name, Outcome.WRONG, str(wrong))
    except TimeUp:
        verdict = Verdict(case.name, Outcome.WRONG, f"has not ended after {case.seconds or SECONDS:g} s")
    except BaseException as error:  # panics of libraries in Rust are no Exceptions
        faults = faults_of(error, case)
        said = f"{type(error).__name__}: {error}"
        verdict = Verdict(case.name, Outcome.REFUSED, said)
        if faults:
            verdict = Verdict(case.name, Outcome.WRONG, f"{'; '.join(faults)}: {said[:600]!r}")
    grown = peak_bytes() - before
    if grown > MAX_GROWTH_BYTES:
        took = time.monotonic() - start
        said = f"took {grown / 2**20:,.0f} MiB of memory ({took:.1f} s); {verdict.said}"
        verdict = Verdict(case.name, Outcome.WRONG, said)
    return verdict


def faults_of(error: BaseException, case: Case) -> list[str]:
    """What is not clear about an error as the answer to a case."""
    message = str(error)
    faults = []
    if type(error) not in case.promised:
        faults.append(f"a bare {type(error).__name__}")
    if not message.strip():
        return [*faults, "no message"]
    faults += form_faults(message, case.given_text)
    for group in case.named:
        if not any(word in message for word in group):
            faults.append(f"does not name {' or '.join(group[:6])}")
    unknown = inner_words(message, case)
    if unknown:
        faults.append(f"names {', '.join(unknown)}, which no user has given")
    return faults


def form_faults(message: str, given: str = "") -> list[str]:
    """Faults in the form of a message for users, whatever its content; it may quote their input."""
    first, *rest = message.split("\n")
    is_list = first.endswith(":") and all(line.startswith("  - ") for line in rest)
    faults = []
    if rest and not is_list:
        faults.append("several lines")
    if len(rest) > _MAX_LINES or len(message) > _MAX_CHARACTERS:
        faults.append(f"too long ({len(rest) + 1} lines, {len(message)} characters)")
    if not all(line.isprintable() for line in (first, *rest)):
        faults.append("control characters")
    if spoken := [found for found in _INNER.findall(message) if found not in given]:
        faults.append(f"speaks of the code ({spoken[0]})")
    return faults


def inner_words(message: str, case: Case) -> list[str]:
    """Words of code (with an underscore) in a message that are neither the user's nor the formats' nor in the files.

    A word of the user may be cut where the message is.
    """
    given = f"{case.name} {case.given_text}"
    without_paths = re.sub(r"(?<!\S)[/~]\S+", "", message)
    unknown = {word for word in _WORD.findall(without_paths) if "_" in word} - _public_words()
    return sorted(word for word in unknown if word not in given)


@cache
def _public_words() -> frozenset[str]:
    """Words known to users: those of the README, of the checkpoints' files and of transformers' configs."""
    files = [_TESTS.parent / "README.md", *(_TESTS / "golden").glob("*/config.json")]
    files += [*(_TESTS.parent / "models" / "demo").rglob("*.json"), Path(__file__).with_name("class_defaults.json")]
    words = {word for file in files for word in _WORD.findall(file.read_text(encoding="utf-8"))}
    folders = (_TESTS / "golden", _TESTS.parent / "models" / "demo")
    for file in (file for folder in folders for file in folder.rglob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        words.update(word for tensor in header for word in _WORD.findall(tensor))
    return frozenset(words | _OF_FORMATS)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> NoReturn:
        raise TimeUp

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, seconds),
        (signal.SIGALRM, signal.ITIMER_REAL, WALL_FACTOR * seconds),
    )
    previous = {number: signal.signal(number, ring) for number, _, _ in timers}
    for _, timer, after in timers:
        signal.setitimer(timer, after, 1.0)  # repeatedly: an exception raised in a callback is lost
    try:
        yield
    finally:
        for number, timer, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, previous[number])


@contextlib.contextmanager
def _as_users_run() -> Iterator[None]:
    """Without the session's checks of annotations; warnings only warn, but must be as clear as errors."""
    checked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", checked)
    for warning in caught:
        if faults := form_faults(str(warning.message)):
            raise WrongResult(f"a warning that is not clear ({'; '.join(faults)}): {str(warning.message)[:300]!r}")


@contextlib.contextmanager
def _memory_limit(more_bytes: int) -> Iterator[None]:
    """Limits address space to the present use and `more_bytes`: larger requests fail instead of filling the machine."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():  # not on macOS, where the limit has no effect
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Report:
    """The verdicts on a subject's cases."""

    verdicts: tuple[Verdict, ...]

    @property
    def counts(self) -> Counter[str]:
        return Counter(verdict.outcome.value for verdict in self.verdicts)

    @property
    def wrong(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.outcome is Outcome.WRONG]

    def summary(self) -> str:
        return f"{len(self.verdicts)} cases: " + ", ".join(f"{self.counts[one.value]} {one.value}" for one in Outcome)

    def failures(self, most: int = 40) -> str:
        """The failures, and how to rerun one of them."""
        lines = [f"{verdict.name}\n    {verdict.said}" for verdict in self.wrong[:most]]
        again = "see one again with: python -m tests.fuzz.again 'NAME'"
        return "\n".join([self.summary(), again, *lines, f"... of {len(self.wrong)}"])


def judge_all(cases: Iterable[Case]) -> Report:
    return Report(tuple(judge(case) for case in cases))
