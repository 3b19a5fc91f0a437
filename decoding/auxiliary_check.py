"""Checks auxiliary weights: their facts must have what the strategy needs, and their shapes must fit the model.

Each kind has an entry in `KINDS`: the settings that `about.shape` must give, and the shapes of the weights.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from decodax.core.printable import printable
from decodax.decoding.drafters.kangaroo import exit_adapter
from decodax.models.checkpoints.reading import flat_weights

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

Shapes = dict[str, tuple[int, ...]]  # by the name of a weight: its keys, separated by dots
Check = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and what is expected

_MOST_DISTANCES, _MOST_RANKS = 64, 2**12


def _is_whole(value: Any, smallest: int) -> bool:
    return type(value) is int and value >= smallest


def _is_number(value: Any) -> bool:
    """False for infinity, NaN, and whole numbers larger than any float."""
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

# What was measured with auxiliary weights and is read by a strategy.
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
    """A kind of auxiliary weights: what it must hold.

    shapes: (model, settings, shapes found) -> the shapes expected; None: only a LoRA adapter.
    settings: what `about.shape` must give.
    with_adapter: settings that must come with a LoRA adapter, which the kind may hold; None: it holds none.
    """

    shapes: Callable[["LanguageModel", Mapping[str, Any], Shapes], Shapes] | None
    settings: Mapping[str, Check] = field(default_factory=dict)
    with_adapter: Mapping[str, Check] | None = None


def check_value(where: str, value: Any, check: Check) -> None:
    """Raises ValueError, naming `where` the value is, when it is not allowed."""
    if not check[0](value):
        raise ValueError(f"{where} must be {check[1]}, got {printable(repr(value))}")


@contextlib.contextmanager
def naming_settings(where: str) -> Iterator[None]:
    """Adds the name of the auxiliary weights to errors of what is built from their settings."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"about.shape of {where}: {printable(error)}") from error


def check_auxiliary_weights(
    where: str, kind: str, settings: Mapping[str, Any], params: Any, lm: "LanguageModel"
) -> None:
    """Raises ValueError where auxiliary weights do not fit their kind and the model; unknown kinds are not checked.

    where: the name of the auxiliary weights, for messages.
    kind: as in `KINDS`.
    settings: their `about.shape`.
    params: nested dictionaries of arrays.
    lm: the model they are for.
    """
    known = KINDS.get(kind)
    if known is None:
        return
    found = _flat(where, params)
    has_adapter = any(name.startswith(_ADAPTER) for name in found)
    expected_settings = {**known.settings, **((known.with_adapter or {}) if has_adapter else {})}
    for name, check in expected_settings.items():
        check_value(f"about.shape.{name} of {where}", settings.get(name), check)
    if known.shapes is None and not has_adapter:
        raise ValueError(f"{where} must hold a LoRA adapter (weights named {_ADAPTER}...), got none")
    with naming_settings(where):
        expected = {} if known.shapes is None else known.shapes(lm, settings, found)
    if known.with_adapter is not None:
        expected |= _adapter_shapes(where, lm, found)
    if odd := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
        name = odd[0]
        rest = f", and {len(odd) - 1} more weights do not fit" if len(odd) > 1 else ""
        raise ValueError(
            f"the weight {printable(name)} of {where} must have {_shape_text(expected, name)}, got "
            f"{_shape_text(found, name)}{rest}: use weights of kind {kind} that were trained for {lm.path.name}"
        )


def _shape_text(shapes: Shapes, name: str) -> str:
    return f"shape {list(shapes[name])}" if name in shapes else "none of this name"


def _flat(where: str, params: Any, prefix: str = "") -> Shapes:
    """The shapes of nested weights, by name."""
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
    """A size that the weights are free to choose, as found in them; 1 where they lack it."""
    return max(found[name][axis], 1) if len(found.get(name, ())) > axis else 1


_ADAPTER = "low_rank."


def _adapter_shapes(where: str, lm: "LanguageModel", found: Shapes) -> Shapes:
    """The shapes of a LoRA adapter, which may leave out matrices."""
    matrices = {".".join(path): weight.shape for path, weight in flat_weights(lm.config.weights()).items()}
    expected: Shapes = {}
    for name in found:
        if not name.startswith(_ADAPTER):
            continue
        place = name.removeprefix(_ADAPTER).rpartition(".")[0]
        shape = matrices.get(place)
        if shape is None or len(shape) != 2:
            raise ValueError(
                f"{where} adapts a matrix {printable(place)}, and {lm.path.name} has none of that name: use weights "
                "that were trained for it"
            )
        rank = _size(found, f"{_ADAPTER}{place}.down", 0)
        expected |= {f"{_ADAPTER}{place}.up": (shape[0], rank), f"{_ADAPTER}{place}.down": (rank, shape[1])}
    return expected


def _prompt_tokens(lm: "LanguageModel", settings: Mapping[str, Any], found: Shapes) -> Shapes:
    return {"embedding": (_size(found, "embedding", 0), _size(found, "embedding", 1), lm.config.hidden_size)}


def _medusa_heads(lm: "LanguageModel", settings: Mapping[str, Any], found: Shapes) -> Shapes:
    """As many heads and blocks as are found, each complete, and an output matrix for all heads or for none."""
    width, expected = lm.config.hidden_size, {}
    heads = len({name.split(".")[1] for name in found if re.match(r"heads\.head_\d+\.", name)})
    for head in (f"heads.head_{index}" for index in range(max(heads, 1))):
        blocks = len({name.split(".")[2] for name in found if re.match(rf"{head}\.block_\d+\.", name)})
        for block in range(max(blocks, 1)):
            expected |= {f"{head}.block_{block}.weight": (width, width), f"{head}.block_{block}.bias": (width,)}
        if "heads.head_0.out" in found:
            expected[f"{head}.out"] = (lm.config.vocab_size, width)
    return expected


def _attention_exit(lm: "LanguageModel", settings: Mapping[str, Any], found: Shapes) -> Shapes:
    described = flat_weights(exit_adapter(lm.model, settings["exit_layer"]).weights())
    return {".".join(("adapter", *path)): weight.shape for path, weight in described.items()}


def _layer_gates(lm: "LanguageModel", settings: Mapping[str, Any], found: Shapes) -> Shapes:
    num_layers = lm.config.num_layers
    return {"layer_gates.weight": (num_layers, lm.config.hidden_size), "layer_gates.bias": (num_layers,)}


def _exit_predictors(lm: "LanguageModel", settings: Mapping[str, Any], found: Shapes) -> Shapes:
    num, likely, width = lm.config.num_layers - 1, _size(found, "hidden", 1), _size(found, "hidden", 2)
    likely = max(likely // 3, 1) * 3
    return {"hidden": (num, likely, width), "hidden_bias": (num, width), "out": (num, width), "out_bias": (num,)}


KINDS: Mapping[str, Kind] = {
    "ppd": Kind(_prompt_tokens),
    "medusa": Kind(_medusa_heads, with_adapter={"change_scale": _POSITIVE}),
    "kangaroo": Kind(_attention_exit, {"exit_layer": _SIZE}),
    "first": Kind(_layer_gates, {"threshold": SHARE, "kept_first": _COUNT, "kept_last": _COUNT}, with_adapter={}),
    "skip_decode": Kind(None, {"min_layers": _SIZE, "max_layers": _SIZE_OR_NULL, "warmup": _COUNT}, with_adapter={}),
    "layer_skip": Kind(None, with_adapter={}),
    "specee": Kind(_exit_predictors),
}
