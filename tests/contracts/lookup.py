"""Looks up the examples of a folder's methods: in a file of examples, a function has the name of the method it is for.

The function returns one example, or a dictionary {variant: example}. It is called when tests are collected, so it makes
no more than small objects. A name that starts with an underscore is a helper's.
"""

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any


class Examples(Mapping[str, Any]):
    """Examples by name: "gqa" for a method with one, "gqa, window" for a variant.

    A method without a function is listed, too, and LookupError is raised where its example is asked for. So the tests
    of that method fail, and the others run.

    methods: METHODS of the folder.
    """

    def __init__(self, found: dict[str, Any], missing: dict[str, str], methods: Mapping[str, type]) -> None:
        self._found, self._missing, self._methods = found, missing, methods

    def __getitem__(self, name: str) -> Any:
        if name in self._missing:
            raise LookupError(self._missing[name])
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._found, *self._missing)

    def __len__(self) -> int:
        return len(self._found) + len(self._missing)

    def method_of(self, name: str) -> type:
        """The class that METHODS lists for an example."""
        return self._methods[_method(name)]

    @property
    def one_of_each(self) -> list[str]:
        """The first example of every method, for rules that ask little of variants."""
        return list({_method(name): name for name in reversed(list(self))}.values())[::-1]


def _method(name: str) -> str:
    return name.split(", ", 1)[0]


def examples_of(folder_module: ModuleType, METHODS: Mapping[str, type]) -> Examples:
    """The examples of all methods.

    folder_module: the file of examples, `tests/contracts/examples/<folder>.py`.
    METHODS: of the folder.
    Raises ValueError for a function without a method, or one that returns no variants.
    """
    functions = {
        name: value
        for name, value in vars(folder_module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == folder_module.__name__
        if callable(value) and not isinstance(value, type)
    }
    path = folder_module.__name__.replace(".", "/") + ".py"
    strays = sorted(functions.keys() - METHODS.keys())
    if strays:
        raise ValueError(f"{path} has functions without a method: {', '.join(strays)}; METHODS lists {list(METHODS)}")
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for method in METHODS:
        if method not in functions:
            missing[method] = f"METHODS lists {method!r}, which has no example: write a function {method}() in {path}"
            continue
        example = functions[method]()
        variants = {f"{method}, {variant}": each for variant, each in example.items()} if type(example) is dict else {}
        if type(example) is dict and not variants:
            raise ValueError(f"{method}() in {path} must return an example or a dictionary of them, got an empty one")
        found |= variants or {method: example}
    return Examples(found, missing, METHODS)
