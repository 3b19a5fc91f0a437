"""Reads the texts of the command line: prompts from arguments, files and stdin, and other texts among the options."""

import os
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

_UsageError: Any = typer.BadParameter.__base__  # Click's, which Typer does not export, and may vendor
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class PromptCommand(TyperCommand):
    """A command that takes prompts: where one was read as an option, the error says how to pass it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            name = getattr(error, "option_name", None)
            if name is not None and (" " in name or not getattr(error, "possibilities", None)):
                error.message += f'. A prompt that begins with - comes after --, like: {ctx.command_path} -- "-x"'
            raise


def read_prompts(prompts: list[str], files: list[str]) -> list[str]:
    """The prompts themselves, then those in files; - is stdin.

    Raises BadParameter when there is none, or stdin is given twice.
    """
    sources = [*(prompt for prompt in prompts if prompt == "-"), *(file for file in files if file == "-")]
    if len(sources) > 1:
        raise typer.BadParameter("stdin (-) can be read once, and was named several times")
    if not prompts and not files:
        raise typer.BadParameter("a prompt is needed: some text, --file FILE, or - for stdin")
    given = [read_text("-") if text == "-" else as_text(text, f"prompt {row}") for row, text in enumerate(prompts)]
    return given + [read_text(file) for file in files]


def as_text(argument: str, name: str) -> str:
    """The text of an argument, which Python decodes by the locale: bytes beyond that are UTF-8.

    Raises BadParameter where they are not. (Python keeps such bytes as lone surrogates, which are no text.)
    """
    if not any("\udc80" <= character <= "\udcff" for character in argument):
        return argument
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{name} must be text in UTF-8: {error}") from error


def read_text(file: str, what: str = "a prompt") -> str:
    """The text of a file, or of stdin (-); `what` is what errors call it.

    Raises ValueError for a text that is not in UTF-8, or empty.
    """
    name = "stdin" if file == "-" else os.fsencode(file).decode("utf-8", "backslashreplace")
    if file == "-" and sys.stdin is None:
        raise ValueError(f"stdin is closed, so {what} cannot be read from it (-): name a file")
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        text = content.decode("utf-8-sig")  # without the byte order mark of some editors
    except UnicodeDecodeError as error:
        found = " (it looks like UTF-16)" if content.startswith(_UTF_16) else ""
        raise ValueError(f"{name} must be text in UTF-8{found}: {error}") from error
    if not text:
        raise ValueError(f"{name} is empty: {what} must hold some text")
    return text
