"""Keeps what strategies built for a model, so that a second call reads, merges and measures nothing."""

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from decodax.core.arguments import refusal
from decodax.decoding.draft_length import DraftChoice
from decodax.decoding.strategies import Speculation, Strategy
from decodax.models.checkpoints.model_files import stamp

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

MAX_BUILT = 4  # strategies of one model, least recently used ones are dropped: each may hold merged weights

_built: "WeakKeyDictionary[LanguageModel, OrderedDict[Hashable, Any]]" = WeakKeyDictionary()


def build_once(strategy: Strategy, lm: "LanguageModel", draft: Any, batch_size: int) -> Speculation | DraftChoice:
    """`strategy.build`, or what it gave for the same arguments, with the drafter's weights on the model's devices.

    A folder is read again when its files have changed. Raises what `Strategy.build` raises.
    """
    key = (strategy, _identity(draft), batch_size if strategy.measures else None)
    return _kept(lm, key, lambda: _built_by(strategy, lm, draft, batch_size))


def _built_by(strategy: Strategy, lm: "LanguageModel", draft: Any, batch_size: int) -> Any:
    built: Any = strategy.build(lm, draft, batch_size)
    if not isinstance(built, Speculation | DraftChoice) and not callable(built):
        raise refusal(f"what {type(strategy).__name__}.build returns", "a Speculation(drafter, verifier)", built)
    return built


def on_devices_of(lm: "LanguageModel", speculation: Speculation) -> Speculation:
    """A user's strategy with the drafter's weights on the model's devices, where they are put once."""
    return _kept(lm, speculation, lambda: speculation)


def _identity(draft: Any) -> Hashable:
    """Equal for the same draft: a folder with the same files, or the very same object."""
    return (os.fspath(draft), stamp(draft)) if isinstance(draft, str | os.PathLike) else _Same(draft)


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """Equal to another for the very same object, which it keeps alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _kept(lm: "LanguageModel", key: Hashable, build: Any) -> Any:
    of_model = _built.setdefault(lm, OrderedDict())
    made = of_model.pop(key, None)
    if made is None:
        made = build()
        if isinstance(made, Speculation):
            made = dataclasses.replace(made, draft_params=lm.model.execution.replicated(made.draft_params))
    of_model[key] = made
    while len(of_model) > MAX_BUILT:
        of_model.popitem(last=False)
    return made
