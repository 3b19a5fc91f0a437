"""Lists every method in decodax, read from the folders' own dictionaries and from the methods' own docstrings.

Each fact is kept with the method: its name in its folder's dictionary, its paper in its docstring (the title, then
`arXiv` and the number). A kind says what holds for all its methods; a method for which it does not hold says so itself,
in an attribute `lossless` (bool) or `auxiliary_weights` (what has to be trained, and where it comes from).
"""

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decodax.core.method_text import option_names
from decodax.decoding.drafters import METHODS as DRAFTERS
from decodax.decoding.early_exit import METHODS as LAYER_POLICIES
from decodax.decoding.logits_processors import METHODS as LOGITS_PROCESSORS
from decodax.decoding.strategies import METHODS as STRATEGIES
from decodax.decoding.verifiers import METHODS as VERIFIERS
from decodax.layers.kv_cache import METHODS as KV_CACHES
from decodax.layers.mixers import METHODS as MIXERS
from decodax.layers.moe import METHODS as FEED_FORWARDS
from decodax.layers.moe.dispatch import METHODS as DISPATCHES
from decodax.layers.moe.routers import METHODS as ROUTERS
from decodax.layers.rope import SCALINGS
from decodax.models.families import FAMILIES
from decodax.sharding import METHODS as PARALLELISMS

_PAPER = re.compile(r"((?:[^;|().]|\.(?=\S))+?)\s*[,(]\s*arXiv\s+(\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Kind:
    """Methods that do the same job.

    methods: the dictionary of their folder, `package`.
    lossless: whether they are, unless one says otherwise.
    test: the file that tests them, with {file} for the method's own.
    """

    name: str
    methods: Mapping[str, Any]
    package: str
    lossless: bool
    test: str


@dataclass(frozen=True)
class Method:
    """One method.

    folder: where its file is, from the root of the source.
    paper: title and arXiv number, None when there is none.
    lossless: the method adds no approximation and no change of its own to what the checkpoint defines.
    auxiliary_weights: weights beyond the model's own that it needs, None for none.
    test: from the root of the source.
    options: with their defaults, of a method that a text may name with them (`core/method_text.py`).
    """

    name: str
    kind: str
    folder: str
    paper: str | None
    lossless: bool
    auxiliary_weights: str | None
    test: str
    options: tuple[str, ...] = ()


KINDS = (
    Kind("strategy", STRATEGIES, "decoding.strategies", True, "tests/contracts/test_strategies.py"),
    Kind("drafter", DRAFTERS, "decoding.drafters", True, "tests/decoding/drafters/test_{file}.py"),
    Kind("verifier", VERIFIERS, "decoding.verifiers", True, "tests/contracts/test_verifiers.py"),
    Kind("layer policy", LAYER_POLICIES, "decoding.early_exit", False, "tests/decoding/early_exit/test_{file}.py"),
    Kind(
        "logits processor",
        LOGITS_PROCESSORS,
        "decoding.logits_processors",
        False,
        "tests/decoding/test_logits_processors.py",
    ),
    Kind("mixer", MIXERS, "layers.mixers", True, "tests/layers/mixers/test_{file}.py"),
    Kind("cache", KV_CACHES, "layers.kv_cache", True, "tests/layers/kv_cache/test_{file}.py"),
    Kind("feed-forward", FEED_FORWARDS, "layers", True, "tests/layers/moe/test_layer.py"),
    Kind("router", ROUTERS, "layers.moe.routers", True, "tests/contracts/test_routers.py"),
    Kind("dispatch algorithm", DISPATCHES, "layers.moe.dispatch", True, "tests/contracts/test_dispatch.py"),
    *(
        Kind(f"{axis} parallelism", methods, "sharding", True, f"tests/sharding/test_{axis}.py")
        for axis, methods in PARALLELISMS.items()
    ),
    Kind("position scaling", SCALINGS, "layers", True, "tests/layers/test_rope.py"),
    Kind("family", FAMILIES, "models.families", True, "tests/models/test_families.py"),
)


def catalogue() -> list[Method]:
    """Every method, in the order of KINDS and of their dictionaries."""
    return [_row(kind, name, method) for kind in KINDS for name, method in kind.methods.items()]


def module_of(kind: Kind, name: str, method: Any) -> str:
    """The full name of the module that defines a method: its own, or for plain data the one of its name."""
    is_code = inspect.isclass(method) or inspect.isfunction(method)
    return method.__module__ if is_code else f"decodax.{kind.package}.{name}"


def _row(kind: Kind, name: str, method: Any) -> Method:
    module = module_of(kind, name, method)
    folder, _, file = module.removeprefix("decodax.").rpartition(".")
    own = inspect.getdoc(method) if inspect.isclass(method) or inspect.isfunction(method) else None
    shares_file = sum(module_of(kind, *item) == module for item in kind.methods.items()) > 1
    return Method(
        name=name,
        kind=kind.name,
        folder=folder.replace(".", "/"),
        paper=_paper(own) or (None if shares_file else _paper(sys.modules[module].__doc__)),
        lossless=getattr(method, "lossless", kind.lossless),
        auxiliary_weights=getattr(method, "auxiliary_weights", None),
        test=kind.test.format(file=file),
        options=tuple(f"{option}={getattr(method, option)}" for option in option_names(method))
        if kind.methods is STRATEGIES
        else (),
    )


def _paper(docstring: str | None) -> str | None:
    """The papers that a docstring names, each as "title (arXiv number)"."""
    found = _PAPER.findall(" ".join((docstring or "").split()))
    return "; ".join(f"{title.strip().removeprefix('Paper: ')} (arXiv {number})" for title, number in found) or None
