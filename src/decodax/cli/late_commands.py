"""Imports the file of a command when the command is run; `--help` only reads what the file says of it."""

import ast
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


def late_group(
    names: Collection[str],
    classes: Mapping[str, type[TyperCommand]] = MappingProxyType({}),
    epilog: str | None = None,
    prefix: str = "",
) -> type[TyperGroup]:
    """A class of command groups, for `typer.Typer(cls=...)`.

    names: of the commands. The function of each has the same name, and stands in the file of that name in this folder;
        the function's docstring is its help.
    classes: what a command is made with, where that is not TyperCommand.
    epilog: the last paragraph of each one's help.
    prefix: before the name of each file.
    """

    class LateGroup(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return [*names, *super().list_commands(ctx)]

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name not in names:
                return super().get_command(ctx, cmd_name)
            module = f"{__package__}.{prefix}{cmd_name}"

            def load() -> Any:
                single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
                command_class = classes.get(cmd_name, TyperCommand)
                single.command(cmd_name, epilog=epilog, cls=command_class)(getattr(import_module(module), cmd_name))
                return typer.main.get_command(single)

            return _LateCommand(load, name=cmd_name, help=_help(module, cmd_name))

    return LateGroup


class _LateCommand(TyperCommand):
    """Stands for a command in the help of its group, and becomes the command when it is run."""

    def __init__(self, load: Callable[[], Any], **options: Any) -> None:
        super().__init__(**options)
        self._load = load

    def make_context(self, *args: Any, **options: Any) -> Any:
        return self._load().make_context(*args, **options)


def _help(module: str, function: str) -> str | None:
    """The docstring of a function, read from its file without importing it."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, f"no file of {module}"
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return ast.get_docstring(next(functions))
