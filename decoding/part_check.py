"""Checks a trained part: that its facts say what its strategy asks, and that its weights fit the model it shall serve.

Each kind of part has an entry in `KINDS`: the settings that its `about.shape` must give, and the shapes of its weights.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from decodax.decoding.drafters.kangaroo import exit_adapter
from decodax.models.checkpoint import flat_weights
from decodax.models.model_files import printable

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

Shapes = dict[str, tuple[int, ...]]  # by a weight's name, its keys joined by dots
Check = tuple[Callable[[Any], bool], str]  # whether a value will do, and what was expected

_MOST_DISTANCES, _MOST_RANKS = 64, 2**12


def _is_whole(value: Any, smallest: int) -> bool:
    return type(value) is int and value >= smallest


def _is_number(value: Any) -> bool:
    """Infinity and NaN are none, nor is a whole number that is larger than any float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _are_shares(value: Any) -> bool:
    return isinstance(value, list | tuple) and 0 < len(value) <= _MOST_RANKS and all(map(_is_share, value))


def _are_rows(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and 0 < len(value) <= _MOST_DISTANCES
    return is_list and all(map(_are_shares, value)) and len({len(row) for row in value}) == 1


_COUNT: Check = (lambda value: _is_whole(value, 0), "a whole number from 0 on")
_SIZE: Check = (lambda value: _is_whole(value, 1), "a whole number from 1 on")
_SIZE_OR_NULL: Check = (lambda value: value is None or _is_whole(value, 1), "null or a whole number from 1 on")
SHARE: Check = (_is_share, "a number in 0..1")
SHARES: Check = (_are_shares, f"a list of numbers in 0..1, at most {_MOST_RANKS}")
_POSITIVE: Check = (lambda value: _is_number(value) and value > 0, "a number above 0")

# What is measured of a part, where a strategy reads it.
MEASURED: Mapping[str, Check] = {
    "rank_accuracy": (_are_rows, f"a list of equally long lists of numbers in 0..1, at most {_MOST_DISTANCES} of them"),
    "exit_agreement": SHARES,
    "hot_layers": (
        lambda value: isinstance(value, list) and all(_is_whole(layer, 1) for layer in value),
        "a list of whole numbers from 1 on",
    ),
}


@dataclass(frozen=True)
class Kind:
    """settings: what `about.shape` must give. shapes: (model, settings, shapes found) -> the shapes that there must be;
    None: the part is a low-rank change alone.

    with_change: settings that must be there beside a low-rank change, which the part may have; None: it has none.
    """

    shapes: Callable[["LanguageModel", Mapping[str, Any], Shapes], Shapes] | None
    settings: Mapping[str, Check] = field(default_factory=dict)
    with_change: Mapping[str, Check] | None = None


def check_value(where: str, value: Any, check: Check) -> None:
    """Raises ValueError, naming `where` the value stands, when it will not do."""
    if not check[0](value):
        raise ValueError(f"{where} must be {check[1]}, got {printable(repr(value))}")


@contextlib.contextmanager
def naming_settings(where: str) -> Iterator[None]:
    """What is built by a part's settings refuses them by names of its own: here the part is named as well."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"about.shape of {where}: {printable(error)}") from error


def check_part(where: str, kind: str, settings: Mapping[str, Any], params: Any, lm: "LanguageModel") -> None:
    """Raises ValueError where a part of this kind does not fit the model; `where` names it. Other kinds are not known.

    settings: what it says under `about.shape`.
    """
    known = KINDS.get(kind)
    if known is None:
        return
    found = _flat(where, params)
    has_change = any(name.startswith(_CHANGE) for name in found)
    wanted_settings = {**known.settings, **((known.with_change or {}) if has_change else {})}
    for name, check in wanted_settings.items():
        check_value(f"about.shape.{name} of {where}", settings.get(name), check)
    if known.shapes is None and not has_change:
        raise ValueError(f"{where} must hold a low-rank change (weights named {_CHANGE}...), and has none")
    with naming_settings(where):
        wanted = {} if known.shapes is None else known.shapes(lm, settings, found)
    if known.with_change is not None:
        wanted |= _change_shapes(where, lm, found)
    if odd := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
        name = odd[0]
        rest = f", and {len(odd) - 1} more weights do not fit" if len(odd) > 1 else ""
        raise ValueError(
            f"the weight {printable(name)} of {where} must have {_said(wanted, name)}, got {_said(found, name)}{rest}: "
            f"use a part of kind {kind} that was trained for {lm.path.name}"
        )


def _said(shapes: Shapes, name: str) -> str:
    return f"shape {list(shapes[name])}" if name in shapes else "none of this name"


def _flat(where: str, params: Any, prefix: str = "") -> Shapes:
    """The shapes of nested weights by their names."""
    if not isinstance(params, Mapping):
        raise ValueError(f"the weights of {where} must be nested dictionaries of arrays")
    shapes: Shapes = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            shapes |= _flat(where, value, f"{prefix}{name}.")
        else:
            shapes[f"{prefix}{name}"] = tuple(getattr(value, "shape", ()))
    return shapes


def _size(found: Shapes, name: str, axis: int) -> int:
    """What the weights that are there say of a size that the part is free to choose; 1 where they do not."""
    return max(found[name][axis], 1) if len(found.get(name, ())) > axis else 1


_CHANGE = "low_rank."


def _change_shapes(where: str, lm: "LanguageModel", found: Shapes) -> Shapes:
    """The shapes of a low-rank change, which may leave out matrices."""
    matrices = {".".join(path): weight.shape for path, weight in flat_weights(lm.config.weights()).items()}
    wanted: Shapes = {}
    for name in found:
        if not name.startswith(_CHANGE):
            continue
        place = name.removeprefix(_CHANGE).rpartition(".")[0]
        shape = matrices.get(place)
        if shape is None or len(shape) != 2:
            raise ValueError(
                f"{where} changes a matrix {printable(place)}, and {lm.path.name} has none of that name: use a part "
                "that was trained for it"
            )
        rank = _size(found, f"{_CHANGE}{place}.down", 0)
        wanted |= {f"{_CHANGE}{place}.up": (shape[0], rank), f"{_CHANGE}{place}.down": (rank, shape[1])}
    return wanted


def _prompt_tokens(lm: "LanguageModel", settings: Mapping[str, Any], found: Shapes) -> Shapes:
    return {"embedding": (_size(found, "embedding", 0), _size(found, "embedding", 1), lm.config.hidden_size)}


def _medusa_heads(lm: "LanguageModel", settings: Mapping[str, Any], found: Shapes) -> Shapes:
    """As many heads and blocks as there are weights of, each whole, and all with an output matrix or none."""
    width, wanted = lm.config.hidden_size, {}
    heads = len({name.split(".")[1] for name in found if re.match(r"heads\.head_\d+\.", name)})
    for head in (f"heads.head_{index}" for index in range(max(heads, 1))):
        blocks = len({name.split(".")[2] for name in found if re.match(rf"{head}\.block_\d+\.", name)})
        for block in range(max(blocks, 1)):
            wanted |= {f"{head}.block_{block}.weight": (width, width), f"{head}.block_{block}.bias": (width,)}
        if "heads.head_0.out" in found:
            wanted[f"{head}.out"] = (lm.config.vocab_size, width)
    return wanted


def _attention_exit(lm: "LanguageModel", settings: Mapping[str, Any], found: Shapes) -> Shapes:
    described = flat_weights(exit_adapter(lm.model, settings["exit_layer"]).weights())
    return {".".join(("adapter", *path)): weight.shape for path, weight in described.items()}


def _routers(lm: "LanguageModel", settings: Mapping[str, Any], found: Shapes) -> Shapes:
    num_layers = lm.config.num_layers
    return {"routers.weight": (num_layers, lm.config.hidden_size), "routers.bias": (num_layers,)}


def _exit_predictors(lm: "LanguageModel", settings: Mapping[str, Any], found: Shapes) -> Shapes:
    num, likely, width = lm.config.num_layers - 1, _size(found, "hidden", 1), _size(found, "hidden", 2)
    likely = max(likely // 3, 1) * 3
    return {"hidden": (num, likely, width), "hidden_bias": (num, width), "out": (num, width), "out_bias": (num,)}


KINDS: Mapping[str, Kind] = {
    "ppd": Kind(_prompt_tokens),
    "medusa": Kind(_medusa_heads, with_change={"change_scale": _POSITIVE}),
    "kangaroo": Kind(_attention_exit, {"exit_layer": _SIZE}),
    "first": Kind(_routers, {"threshold": SHARE, "kept_first": _COUNT, "kept_last": _COUNT}, with_change={}),
    "skip_decode": Kind(None, {"min_layers": _SIZE, "max_layers": _SIZE_OR_NULL, "warmup": _COUNT}, with_change={}),
    "layer_skip": Kind(None, with_change={}),
    "specee": Kind(_exit_predictors),
}
