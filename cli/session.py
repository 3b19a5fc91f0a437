"""What every command shares: errors as one line, the compilation cache, progress on stderr, versions."""

import hashlib
import io
import os
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

import decodax
from decodax.cli import hosts
from decodax.sharding.rules import MESH_AXES

MAX_CACHE_BYTES = 2**30
FAILED, INTERRUPTED, READER_GONE = 1, 130, 141  # the last two as shells count them: 128 + SIGINT, 128 + SIGPIPE
_SILENT_SECONDS = 1.0  # a progress display for less only flickers

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead, for programs.")]
ModelName = Annotated[
    str | None,
    typer.Option(help="A model folder, or its id on the Hugging Face hub. Default: the small model inside decodax."),
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
        "--invariant", help="Give a token the same logits, to the last bit, whatever is run beside it. Slower."
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(help="A change of the model's weights, merged into them: what `train layer_skip` wrote."),
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
    """Turns whatever goes wrong inside into one line on stderr and an exit code; warnings become lines too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail again
        hosts.leave_if_joined(READER_GONE)
        raise typer.Exit(READER_GONE) from None
    except KeyboardInterrupt:
        hosts.leave_if_joined(INTERRUPTED)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if debug or isinstance(error, typer.Exit | typer.BadParameter):
            raise
        print_error(hosts.error_prefix() + (str(error) or type(error).__name__))
        hosts.leave_if_joined(FAILED)
        raise typer.Exit(FAILED) from error


def print_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def _print_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def cache_folder() -> Path:
    """Where compiled programs are kept by default: one folder per kind of processor.

    Compiled code uses the instructions of the processor it was compiled on, and a home directory may be shared by
    machines of several kinds.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    root = chosen if chosen.is_absolute() else Path.home() / ".cache"
    processor = f"{platform.machine()} {platform.processor()}"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        processor += next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return root / "decodax" / "xla" / hashlib.sha256(processor.encode()).hexdigest()[:12]


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, at most MAX_CACHE_BYTES of them; JAX's own environment variables win."""
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        warnings.warn(f"{folder} cannot be written: compiled programs are not kept for the next run", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_CACHE_BYTES)


@contextmanager
def progress(label: str) -> Iterator[Callable[[], None]]:
    """Shows on stderr that work goes on, from its second second; gives a function that ends the display early."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    display = Progress(*columns, console=Console(stderr=True), transient=True)
    display.add_task(label, total=None)
    lock, ended = threading.Lock(), threading.Event()

    def show() -> None:
        with lock:
            if not ended.is_set():
                display.start()

    def end() -> None:
        with lock:
            ended.set()
            display.stop()

    timer = threading.Timer(_SILENT_SECONDS, show)
    timer.daemon = True
    timer.start()
    try:
        yield end
    finally:
        timer.cancel()
        end()


def versions() -> dict[str, str]:
    """What a measurement depends on."""
    return {
        "decodax": decodax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind} ({jax.default_backend()})",
    }


def describe(lm: decodax.LanguageModel) -> dict[str, Any]:
    """A model in numbers."""
    leaves = jax.tree.leaves(jax.eval_shape(lm.model.unstacked, lm.params))  # without what pads them on a mesh
    return {
        "path": str(lm.path),
        "num_parameters": sum(leaf.size for leaf in leaves),
        "num_bytes": lm.nbytes,
        "dtype": str(leaves[0].dtype),
        "context_tokens": lm.config.max_position_embeddings,
    }
