"""Imports the packages that only training and pictures need, and says how to install them."""

import importlib
from types import ModuleType


def need(name: str) -> ModuleType:
    """The module of this name.

    Raises ImportError with the command that installs it when it is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise ImportError(f"{package} is needed and not installed: pip install 'decodax[train]'") from error
