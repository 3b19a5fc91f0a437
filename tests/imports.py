"""Reads the imports of every module by AST: what `tests/test_imports.py` and `benchmarks/files_read.py` go by."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up: a folder imports itself and what stands before it. The face is `src/decodax` itself.
FOLDERS = ("core", "kernels_pallas", "sharding", "layers", "models", "decoding", "planning", "face", "scripts")


@dataclass(frozen=True)
class Import:
    """One imported module or name. late: inside a function, or for type checkers only."""

    module: str
    target: str
    name: str | None
    line: int
    late: bool
    for_types: bool

    @property
    def place(self) -> str:
        return f"{self.module}:{self.line}"


def sources(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for folder in (*FOLDERS, "src/decodax"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[2:] if folder == "src/decodax" else parts
            parts = parts[:-1] if parts[-1:] == ("__init__",) else parts
            found[".".join(("decodax", *parts))] = path
    return found


def folder_of(module: str) -> str:
    """The folder at the root that a module stands in, "face" for those in `src/decodax` itself."""
    top = module.split(".")[1] if "." in module else ""
    return top if top in FOLDERS else "face"


def imports_of(module: str, text: str, modules: Mapping[str, object]) -> Iterator[Import]:
    """What a module imports of the package, with the names that it takes from it."""

    def walk(node: ast.AST, late: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checked = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
            if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == "decodax":
                for alias in child.names:
                    whole = f"{child.module}.{alias.name}"
                    if whole in modules:
                        yield Import(module, whole, None, child.lineno, late, for_types)
                    else:
                        yield Import(module, str(child.module), alias.name, child.lineno, late, for_types)
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    if alias.name.split(".")[0] == "decodax":
                        yield Import(module, alias.name, None, child.lineno, late, for_types)
            else:
                yield from walk(child, inner, checked)

    yield from walk(ast.parse(text), False, False)


def all_imports(root: Path = ROOT) -> list[Import]:
    modules = sources(root)
    return [found for name, path in modules.items() for found in imports_of(name, path.read_text("utf-8"), modules)]
