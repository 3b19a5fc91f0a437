"""Provides what every command shares: errors as one line, common options, progress on stderr, versions."""

import os
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import jax
import typer

import decodax
from decodax import program_cache
from decodax.cli import hosts, streams
from decodax.cli.interrupts import INTERRUPTED
from decodax.cli.streams import READER_GONE
from decodax.sharding.rules import MESH_AXES

if TYPE_CHECKING:
    from rich.progress import Progress

FAILED = 1
_SILENT_SECONDS = 1.0  # a shorter progress display only flickers

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead, for programs.")]
ModelName = Annotated[
    str | None,
    typer.Option(
        help="A model folder or GGUF file, or its id on the Hugging Face hub. Default: the small model inside decodax."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Precision of weights and cache: float32, bfloat16 or float16. Default: float32 on CPU, else bfloat16."
    ),
]

Invariant = Annotated[
    bool,
    typer.Option(
        "--invariant", help="Give a token the same logits, to the last bit, whatever else runs with it. Slower."
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        help="A LoRA adapter to merge into the model's weights (may be repeated, merged in order): a folder that the "
        "PEFT library wrote; the last may be what `train layer_skip` wrote."
    ),
]

MeshName = Annotated[
    str | None,
    typer.Option(
        metavar="AXIS=N,AXIS=N...",
        help="Devices to split the model over, like tensor=4,data=2 "
        f"(axes: {', '.join(MESH_AXES)}). Default: one device.",
    ),
]


@contextmanager
def reported_errors(debug: bool) -> Iterator[None]:
    """Turns any error inside into one line on stderr and an exit code; warnings become lines too."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warning_printer()
            yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail again
        hosts.leave_if_distributed(READER_GONE)
        raise typer.Exit(READER_GONE) from None
    except KeyboardInterrupt:
        hosts.leave_if_distributed(INTERRUPTED)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug or isinstance(error, typer.Exit | typer.BadParameter):
            raise
        if streams.is_of_stdout(error):
            raise typer.Exit(FAILED) from error
        print_error(hosts.error_prefix() + (str(error) or type(error).__name__))
        hosts.leave_if_distributed(FAILED)
        raise typer.Exit(FAILED) from error


def print_error(message: str) -> None:
    print(f"error: {_shown(message)}", file=sys.stderr)


def _shown(message: str) -> str:
    """A message without control characters for a terminal: names of files and tensors may hold any."""
    escaped = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in message)
    return "".join(escaped)


def _warning_printer() -> Callable[..., None]:
    """Prints a warning as a line, and one for the compilation cache as a whole: JAX gives one for each program."""
    is_cache_reported = False

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        nonlocal is_cache_reported
        problem = program_cache.explain(str(message))
        if problem is None or not is_cache_reported:
            print(f"warning: {_shown(problem or str(message))}", file=sys.stderr)
        is_cache_reported |= problem is not None

    return show


def bold(text: str) -> str:
    """The text, bold on a terminal that can do that."""
    return f"\x1b[1m{text}\x1b[0m" if text and sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else text


@contextmanager
def progress(label: str) -> Iterator[Callable[[], None]]:
    """Shows progress on stderr after one second; gives a function that ends the display early."""
    with _progress(label, None) as display:
        yield display.end


@contextmanager
def progress_of(label: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows a bar on stderr after one second; gives a function that takes how much of `total` is done.

    That function also takes another `total=`, and a `note=` to show.
    """
    with _progress(label, total) as display:
        yield display.show_done


@contextmanager
def _progress(label: str, total: int | None) -> Iterator["_Display"]:
    if not sys.stderr.isatty():
        yield _Display()
        return
    from rich import progress as rich
    from rich.console import Console

    amount = (rich.BarColumn(), rich.TaskProgressColumn(), rich.TextColumn("{task.fields[note]}"))
    left = () if total is None else (rich.TextColumn("left"), rich.TimeRemainingColumn())
    columns = (
        rich.SpinnerColumn(),
        rich.TextColumn("{task.description}"),
        *(() if total is None else amount),
        rich.TimeElapsedColumn(),
        *left,
    )
    bar = rich.Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(label, total=total, note="")
    display = _Display(bar)
    timer = threading.Timer(_SILENT_SECONDS, display.start)
    timer.daemon = True
    timer.start()
    try:
        yield display
    finally:
        timer.cancel()
        display.end()


class _Display:
    """A progress display that another thread may start; once ended, it does not start again. None shows nothing."""

    def __init__(self, bar: "Progress | None" = None) -> None:
        self._bar, self._lock, self._ended = bar, threading.Lock(), False

    def start(self) -> None:
        with self._lock:
            if self._bar is not None and not self._ended:
                self._bar.start()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            if self._bar is not None:
                self._bar.stop()

    def show_done(self, amount: int, *, total: int | None = None, note: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=amount, total=total, note=note)


def versions() -> dict[str, str]:
    """The versions and the device that a measurement depends on."""
    return {
        "decodax": decodax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind} ({jax.default_backend()})",
    }


def describe(lm: decodax.LanguageModel) -> dict[str, Any]:
    """A model in numbers."""
    leaves = jax.tree.leaves(jax.eval_shape(lm.model.unstacked, lm.params))  # without their padding on a mesh
    return {
        "path": str(lm.path),
        "num_parameters": sum(leaf.size for leaf in leaves),
        "num_bytes": lm.nbytes,
        "dtype": str(leaves[0].dtype),
        "context_tokens": lm.config.max_position_embeddings,
    }
