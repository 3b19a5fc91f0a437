"""Adds the methods of the package in `tests/decoding/outside/` to those of a folder, so that they pass the same tests.

The package is loaded from its source here; that it works installed is in `tests/decoding/test_outside_package.py`.
"""

from collections.abc import Mapping
from importlib import import_module

OUTSIDE: Mapping[str, Mapping[str, type]] = import_module("tests.decoding.outside.own_methods").METHODS


def with_outside(METHODS: Mapping[str, type], folder: str) -> dict[str, type]:
    """The methods of the package for a folder, and the folder's own.

    folder: its name, as in the package's table.
    """
    outside = OUTSIDE[folder]
    assert not METHODS.keys() & outside.keys(), "a method of the package has the name of one of the folder"
    return {**outside, **METHODS}
