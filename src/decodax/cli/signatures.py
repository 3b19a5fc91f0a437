"""Gives a command options that are made by program: Typer makes them from a function's signature and annotations."""

import inspect
from collections.abc import Sequence
from typing import Any


def insert_options(command: Any, own: Sequence[inspect.Parameter], after: str, without: Sequence[str] = ()) -> None:
    """Changes the signature of `command`, which takes further options by `**name`, to one that lists them.

    own: the options to list, after the one named `after`.
    without: options of the command that are not listed.
    """
    listed = [
        parameter
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in without
    ]
    place = 1 + [parameter.name for parameter in listed].index(after)
    listed[place:place] = own
    # By keyword only, as Typer passes them: then one without a default may follow one that has one.
    listed = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in listed]
    command.__signature__ = inspect.Signature(listed, return_annotation=None)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in listed} | {"return": None}
