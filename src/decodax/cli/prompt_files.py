"""Answers a file of prompts on the command line (`decodax generate --input --output`), with a progress bar."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import decodax
from decodax.decoding.answer_prompts import Report, answer_prompts
from decodax.decoding.options import GenerateOptions

Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help='Prompts in JSON lines: {"prompt": ...}, {"messages": [...]} or {"tokens": [...]}, each with options.',
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", metavar="FILE", help="Where the answers to --input go, a line each. Interrupted, it is resumed."
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Rows that run at once; a row that ends is refilled with the next prompt.")
]


def check(source: str | None, target: str | None, prompts: list[str], num_samples: int, distributed: bool) -> None:
    """Raises BadParameter for options that do not go together."""
    if (source is None) != (target is None):
        raise typer.BadParameter("--input and --output go together")
    if source is None:
        return
    if prompts:
        raise typer.BadParameter("--input takes the place of prompts: give one or the other")
    if num_samples != 1 or distributed:
        raise typer.BadParameter("--n and --distributed do not go with --input")


def run(
    lm: decodax.LanguageModel, source: str, target: str, options: dict[str, Any], *, chat: bool, system: str | None
) -> None:
    """Answers the file; raises ValueError, at the end, where lines could not be answered."""
    with _bar() as show:
        report = answer_prompts(
            lm, Path(source), Path(target), GenerateOptions(**options), chat=chat, system=system, on_answer=show
        )
    print(_summary(report, target), file=sys.stderr)
    if report.errors:
        first = min(report.errors)
        raise ValueError(
            f"{len(report.errors)} of {report.num_lines} prompts have an error in place of an answer; the first is "
            f"prompt {first} of the file, counted from 0: {report.errors[first]}"
        )


def _summary(report: Report, target: str) -> str:
    done = f"{report.num_lines} answers in {target}"
    if report.num_before:
        done += f" ({report.num_before} of them from before)"
    stats = report.stats
    if stats is None:
        return done
    return (
        f"{done}; {stats.num_new_tokens} new tokens in {stats.decode_seconds:.2f} s ({stats.tokens_per_second:.0f} "
        f"tokens/s); {stats.num_prompt_tokens} prompt tokens in {stats.prefill_seconds:.2f} s; compiling "
        f"{stats.compile_seconds:.2f} s"
    )


@contextmanager
def _bar() -> Iterator[Callable[[int, int, int], None]]:
    """A bar on a terminal's stderr; gives a function of the answers so far, all prompts, and new tokens."""
    if not sys.stderr.isatty():
        yield lambda done, total, tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("answering"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task, begin, written = display.add_task("", total=None, speed=0.0), time.perf_counter(), 0

        def show(done: int, total: int, tokens: int) -> None:
            nonlocal written
            written += tokens
            speed = written / (time.perf_counter() - begin)
            display.update(task, completed=done, total=total, speed=speed)

        yield show
