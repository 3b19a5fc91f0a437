"""Imports the names of a package on first use, so that importing one method does not import all of them."""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any


class Methods(Mapping[str, Any]):
    """The methods of a folder by name, each imported when it is looked up.

    package: `__name__` of the folder.
    places: "file:Class" of each method; the class alone where the file has the method's name, and the module's full
        name where it is in another folder.

    >>> Methods("decodax.core", {"printable": "printable_list"})["printable"].__name__
    'printable_list'
    """

    def __init__(self, package: str, places: Mapping[str, str]) -> None:
        self._package = package
        self._places = {name: place if ":" in place else f"{name}:{place}" for name, place in places.items()}

    def __getitem__(self, name: str) -> Any:
        file, _, attribute = self._places[name].partition(":")
        return getattr(import_module(file if "." in file else f"{self._package}.{file}"), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def exports(self) -> dict[str, str]:
        """The file of each class in this folder."""
        places = [place.split(":") for place in self._places.values()]
        return {attribute: file for file, attribute in places if "." not in file}


def exports(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names are imported on use.

    places: the file of each name; "" where the name is itself a module of the package.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place = places[name]
        found = getattr(import_module(f"{package}.{place}"), name) if place else import_module(f"{package}.{name}")
        vars(import_module(package))[name] = found
        return found

    def names() -> list[str]:
        return sorted({*vars(import_module(package)), *places})

    return get, names
