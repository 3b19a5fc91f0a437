"""Finds places in the source where one small bug can be planted, and plants it: a mutation of the syntax tree.

Each kind is a mistake that people make: an operator or a comparison swapped, a number off by one, a sign, a mask, an
axis or a dtype changed, a line dropped. Docstrings, annotations, error texts and code under `raise` are left alone.
"""

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("layers", "decoding", "models", "sharding")
_SWAPPED: dict[type, tuple[type, str]] = {
    ast.Add: (ast.Sub, "+ -> -"),
    ast.Sub: (ast.Add, "- -> +"),
    ast.Mult: (ast.Add, "* -> +"),
    ast.FloorDiv: (ast.Mult, "// -> *"),
    ast.Mod: (ast.FloorDiv, "% -> //"),
    ast.BitAnd: (ast.BitOr, "& -> |"),
    ast.BitOr: (ast.BitAnd, "| -> &"),
    ast.Lt: (ast.LtE, "< -> <="),
    ast.LtE: (ast.Lt, "<= -> <"),
    ast.Gt: (ast.GtE, "> -> >="),
    ast.GtE: (ast.Gt, ">= -> >"),
    ast.Eq: (ast.NotEq, "== -> !="),
    ast.NotEq: (ast.Eq, "!= -> =="),
    ast.And: (ast.Or, "and -> or"),
    ast.Or: (ast.And, "or -> and"),
}
_DTYPES = {"float32": "bfloat16", "int32": "int8", "uint32": "uint8"}
_FUNCTIONS = {"minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any", "cumsum": "flip", "min": "max"}


@dataclass(frozen=True)
class Mutation:
    """One bug. file: from the root. line: where. kind: what was changed. index: number of the place in its file."""

    file: str
    line: int
    kind: str
    index: int


def _skipped(tree: ast.AST) -> set[ast.AST]:
    """Nodes whose change is no bug: annotations, docstrings, texts of errors, decorators, checks of `TYPE_CHECKING`."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef):
            arguments = (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs)
            parts += [node.returns, *node.decorator_list, *(argument.annotation for argument in arguments)]
        if isinstance(node, ast.ClassDef):
            parts += node.decorator_list
        if isinstance(node, ast.AnnAssign):
            parts.append(node.annotation)
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
            parts.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            parts.append(node)
        if isinstance(node, ast.If) and all(isinstance(inner, ast.Raise) for inner in node.body):
            parts += node.body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warn":
            parts.append(node)
        for part in parts:
            if part is not None:
                skipped |= set(ast.walk(part))
    return skipped


def _changes(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every place with what would be done there, in a fixed order; `apply` does the same."""
    skipped = _skipped(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.BinOp) and type(node.op) in _SWAPPED and not isinstance(node.left, ast.Constant):
            yield node, _SWAPPED[type(node.op)][1]
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _SWAPPED:
            yield node, _SWAPPED[type(node.ops[0])][1]
        elif isinstance(node, ast.BoolOp):
            yield node, _SWAPPED[type(node.op)][1]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
            yield node, f"{type(node.op).__name__} dropped"
        elif isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value < 1000:
            yield node, f"{node.value} -> {node.value + 1}"
        elif isinstance(node, ast.Attribute) and node.attr in _DTYPES:
            yield node, f"{node.attr} -> {_DTYPES[node.attr]}"
        elif isinstance(node, ast.Attribute) and node.attr in _FUNCTIONS:
            yield node, f"{node.attr} -> {_FUNCTIONS[node.attr]}"
        elif isinstance(node, ast.Call) and _is_where(node):
            yield node, "branches of where swapped"
        elif isinstance(node, ast.Assign | ast.AugAssign) and _may_go(node):
            yield node, "line dropped"


def _is_where(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute) and node.func.attr == "where" and len(node.args) == 3


def _may_go(node: ast.Assign | ast.AugAssign) -> bool:
    """Whether an assignment gives a name a new value that it is made of: without it the code still runs."""
    if isinstance(node, ast.AugAssign):
        return True
    (target, *more) = node.targets
    names = {inner.id for inner in ast.walk(node.value) if isinstance(inner, ast.Name)}
    return not more and isinstance(target, ast.Name) and target.id in names


def mutations_of(root: Path, file: str) -> list[Mutation]:
    """All bugs that can be planted in a file."""
    tree = ast.parse((root / file).read_text("utf-8"))
    return [Mutation(file, node.lineno, kind, index) for index, (node, kind) in enumerate(_changes(tree))]


def pick(root: Path, seed: int, count: int) -> list[Mutation]:
    """`count` bugs, each in another file, drawn by `seed` alone."""
    files = [str(path.relative_to(root)) for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    draw, found = random.Random(seed), []
    draw.shuffle(files)
    for file in files:
        places = mutations_of(root, file)
        if places:
            found.append(draw.choice(places))
    return found[:count]


def planted(text: str, mutation: Mutation) -> str:
    """The source with the bug in it; comments and layout are lost."""
    tree = ast.parse(text)
    node, kind = list(_changes(tree))[mutation.index]
    assert kind == mutation.kind
    if isinstance(node, ast.BinOp | ast.BoolOp):
        node.op = _SWAPPED[type(node.op)][0]()
    elif isinstance(node, ast.Compare):
        node.ops = [_SWAPPED[type(node.ops[0])][0]()]
    elif isinstance(node, ast.Constant):
        node.value += 1
    elif isinstance(node, ast.Attribute):
        node.attr = (_DTYPES | _FUNCTIONS)[node.attr]
    elif isinstance(node, ast.Call):
        node.args[1:] = node.args[:0:-1]
    else:
        tree = _Without(node).visit(tree)
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


class _Without(ast.NodeTransformer):
    """Drops a statement, or the operator of an expression."""

    def __init__(self, node: ast.AST) -> None:
        self.node = node

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.node:
            return self.generic_visit(node.operand) if isinstance(node, ast.UnaryOp) else ast.Pass()
        return self.generic_visit(node)
