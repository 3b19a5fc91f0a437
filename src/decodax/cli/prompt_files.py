"""Answers a file of prompts on the command line (`decodax generate --input --output`), with a progress bar."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import decodax
from decodax.cli import session
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
    begin, num_written = time.perf_counter(), 0
    with session.progress_of("answering", 1) as show:

        def show_answer(done: int, total: int, tokens: int) -> None:
            nonlocal num_written
            num_written += tokens
            speed = num_written / (time.perf_counter() - begin)
            show(done, total=total, note=f"{done} of {total}, {speed:.0f} tokens/s")

        report = answer_prompts(
            lm, Path(source), Path(target), GenerateOptions(**options), chat=chat, system=system, on_answer=show_answer
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
