"""Runs chat templates in Jinja's sandbox, with the blocks and functions that transformers gives them.

A template reads only what it is given and changes none of it, and `chat_limits.py` ends one that does not end. For
that, the parsed template is changed: loops, concatenated texts and arguments of filters pass through what counts.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_environment
from jinja2.visitor import NodeTransformer

from decodax.models.tokenizers import chat_limits

_COUNTED, _JOINED, _SMALL = "counted items", "concatenated texts", "small argument"  # filters that no template can name


class TemplateRefusal(jinja2.TemplateError):
    """A template's own objection to the messages, made with `raise_exception`."""


def run_template(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of these variables.

    Raises TemplateRefusal where the template refuses them.
    Raises EndlessTemplateError where it takes too many steps, or makes too much text.
    Raises exceptions of many kinds for a template that is wrong.
    """
    pieces, length = [], 0
    with chat_limits.limited_steps():
        for piece in _compiled(template).generate(variables):
            length += len(piece)
            chat_limits.check_size(length)
            pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _Sandbox().from_string(template)


class _Generation(Extension):
    """The block `generation`, which marks the model's answers for training; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        usual = {name: self.globals[name] for name in ("range", "cycler", "joiner")}
        own = {"dict": _new_dict, "namespace": _Namespace, "raise_exception": _refuse, "strftime_now": _now}
        self.globals = {**usual, **own}
        self.filters |= {"tojson": _to_json, "join": _join, "replace": chat_limits.replaced}
        self.filters |= {_COUNTED: chat_limits.counted, _JOINED: chat_limits.concatenate, _SMALL: chat_limits.small}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Counting().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, LoopContext) and args:  # a recursive loop, over its argument
            args = (chat_limits.counted(args[0]), *args[1:])
        if function is not self.globals["range"]:  # which has a limit of its own
            chat_limits.check_call(function, args, kwargs)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        chat_limits.check_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)


class _Counting(NodeTransformer):
    """Puts the counting filters into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (Jinja's name)
        self.generic_visit(node)
        node.iter = _filtered(node.iter, _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes).set_lineno(node.lineno), _JOINED)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.args = [_filtered(argument, _SMALL) for argument in node.args]
        for keyword in node.kwargs:
            keyword.value = _filtered(keyword.value, _SMALL)
        return node


def _filtered(node: Any, name: str) -> Any:
    return nodes.Filter(node, name, [], [], None, None).set_lineno(node.lineno)


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, which could reach Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # type: ignore[misc]
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        Namespace.__setitem__(self, name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no name {name!r} with an underscore first")


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _refuse(message: object = "") -> None:
    raise TemplateRefusal(str(message))


def _now(form: str) -> str:
    chat_limits.check_format(form)
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes that Jinja's own filter makes for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_environment
def _join(environment: jinja2.Environment, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    return chat_limits.concatenate(
        value if attribute is None else map(make_attrgetter(environment, attribute), value), d
    )
