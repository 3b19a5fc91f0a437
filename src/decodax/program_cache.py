"""Keeps compiled programs between runs, in a compilation cache, and warns when that fails."""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

MAX_BYTES = 2**30
_READING, _WRITING = (f"Error {doing} persistent compilation cache entry" for doing in ("reading", "writing"))
_PROGRAM, _NOTE = "-cache", "-atime"  # endings of the names of JAX's files


def folder() -> Path:
    """Where compiled programs are kept by default: one folder per kind of processor.

    Compiled code uses the instructions of the processor it was compiled on, and a home directory may be shared by
    machines of several kinds.
    Raises RuntimeError when nothing says what the home directory is.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    root = chosen if chosen.is_absolute() else Path.home() / ".cache"
    processor = f"{platform.machine()} {platform.processor()}"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        processor += next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return root / "decodax" / "xla" / hashlib.sha256(processor.encode()).hexdigest()[:12]


def use() -> None:
    """Keeps compiled programs between runs, at most MAX_BYTES of them; JAX's own environment variables win.

    Without a folder for them, a warning says so, and nothing is kept.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        kept_in = folder()
    except RuntimeError:
        _warn("this user has no home directory (set HOME or XDG_CACHE_HOME to keep them)")
        return
    if not _can_be_written(kept_in):
        _warn(f"{kept_in} cannot be written")
        return
    jax.config.update("jax_compilation_cache_dir", str(kept_in))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def explain(warning: str) -> str | None:
    """The message instead of JAX's warning about one compiled program of the cache; None for any other warning.

    In our own folder a program that cannot be read is removed, as JAX would keep it and fail again in every run. So is
    one without a note of when it was last read, which keeps JAX from writing any other.
    """
    damaged = "the cache of compiled programs holds damaged ones: they are compiled anew"
    if warning.startswith(_READING):
        _remove_last_read()
        return damaged
    if warning.startswith(_WRITING):
        problem = f"compiled programs are not kept for the next run: {warning.partition(': ')[2]}"
        return damaged if _remove_without_note() else problem
    return None


def _warn(problem: str) -> None:
    warnings.warn(f"compiled programs are not kept for the next run: {problem}", stacklevel=3)


def _can_be_written(path: Path) -> bool:
    """Whether a file can be created in a folder; permissions alone do not tell: a disk may be read-only, or full."""
    probe = path / f".probe-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError:
        return False
    return True


def _own() -> Path | None:
    """The folder that `use` chose, whose files may be removed; None where JAX's cache is another folder."""
    chosen = jax.config.values["jax_compilation_cache_dir"]
    with contextlib.suppress(RuntimeError):
        return Path(chosen) if chosen is not None and Path(chosen) == folder() else None
    return None


def _remove_last_read() -> None:
    """Removes the program that was read last: JAX notes for each when it was read, so that one is at fault."""
    own = _own()
    if own is not None:
        with contextlib.suppress(OSError, ValueError):
            last = max(own.glob(f"*{_NOTE}"), key=lambda note: int.from_bytes(note.read_bytes(), "little"))
            last.with_name(last.name.removesuffix(_NOTE) + _PROGRAM).unlink()


def _remove_without_note() -> int:
    """Removes the programs that were written by a process that ended before it wrote the note; says how many."""
    own, removed = _own(), 0
    if own is not None:
        with contextlib.suppress(OSError):
            for program in own.glob(f"*{_PROGRAM}"):
                if not program.with_name(program.name.removesuffix(_PROGRAM) + _NOTE).exists():
                    program.unlink()
                    removed += 1
    return removed
