"""Reads `adapter_config.json`: the rank and scale of each module, and which modules the adapter changes.

LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; the fields are those of `LoraConfig` of the PEFT
library. A field that is not known here must be null, false or empty: it could change what the tensors mean.

A regular expression of `target_modules` is not evaluated (its search could take for ever): PEFT stores tensors of the
modules that it matched, and of no others.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decodax.core.printable import printable, printable_list
from decodax.models.checkpoints.model_files import read_json_object

_READ = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"),
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
        "target_parameters",
    }
)
_WITHOUT_EFFECT = frozenset(  # on merged weights; fan_in_fan_out too: the model's own tensors say which are transposed
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
    }
)
_INITIAL = (None, True, False, "gaussian", "orthogonal")  # the others change the model's weights, too
_BIAS = (None, "none", "all", "lora_only")
_MOST_RANK = 2**16
# Parameters of one module that PEFT wraps, the last outermost: as transformers' experts define them.
_PARAMETERS = ("weight", "gate_up_proj", "down_proj")
_INNER = ".base_layer"
_MOST_CHARACTERS, _MOST_REPEATS = 200, 4  # of a pattern: a longer search could take for ever

Names = tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """What an adapter's settings say.

    where: the name of their file, for messages.
    base: the model that the adapter was trained for, as the file names it; None if it does not.
    rank, alpha: of modules that no pattern names.
    is_rank_stabilised: whether the scale is alpha / sqrt(rank), not alpha / rank (rsLoRA, arXiv 2312.03732).
    rank_pattern, alpha_pattern: of other modules, by a regular expression for the end of their names.
    targets: the modules that are changed, by the end of their names; None: those that have tensors.
    excluded: the modules that are not, by the end of their names.
    replaced: the modules that are stored as a whole, by a part of their names.
    layers: the layers that are changed; None: all.
    layers_patterns: what the list of layers is called in names of modules; empty: anything.
    parameters: the parameters that are changed beside modules (stacks of experts), by the end of their names.
    """

    where: str
    base: str | None
    rank: int
    alpha: float
    is_rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: Names | None
    excluded: Names
    replaced: Names
    layers: tuple[int, ...] | None
    layers_patterns: Names
    parameters: Names

    def parameter_of(self, module: str) -> str | None:
        """The parameter that the matrices of a module change; None: they are of the module itself.

        PEFT wraps several parameters of a module one after the other: the names of the first have ".base_layer" most
        often.
        """
        name = module
        while name.endswith(_INNER):
            name = name.removesuffix(_INNER)
        wrapped = [f"{name}.{own}" for own in _PARAMETERS if _ends_with(f"{name}.{own}", self.parameters)]
        depth = (len(module) - len(name)) // len(_INNER)
        return wrapped[-1 - depth] if depth < len(wrapped) else None

    def rank_of(self, module: str) -> int:
        """The rank of a module, or of a parameter."""
        return self.rank_pattern.get(_pattern_of(module, self.rank_pattern), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of a module's product of two matrices."""
        alpha = self.alpha_pattern.get(_pattern_of(module, self.alpha_pattern), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def changes(self, module: str) -> bool:
        """Whether PEFT gives a module of this name a pair of matrices."""
        if _ends_with(module, self.excluded) or any(
            re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.replaced
        ):
            return False
        if self.targets is None or module in self.targets:
            return True
        return _ends_with(module, self.targets) and (self.layers is None or self._layer_of(module) in self.layers)

    def _layer_of(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_patterns] or [r".*?\.[^.]*\.(\d+)\."]
        found = next(filter(None, (re.match(pattern, module) for pattern in patterns)), None)
        return None if found is None else int(found[1])


def _ends_with(module: str, names: Names) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern_of(module: str, patterns: Mapping[str, Any]) -> str:
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


def read_settings(file: Path) -> Settings:
    """The settings in an `adapter_config.json`.

    Raises ValueError for another kind of adapter, and for a field that is not supported or has a wrong value.
    """
    where = printable(file)
    try:
        return _settings(read_json_object(file), where)
    except _FieldError as error:
        raise ValueError(f"{where}: {error}") from None


class _FieldError(ValueError):
    """A field has a value that is not supported; the file's name is added where it is known."""


def _settings(fields: Mapping[str, Any], where: str) -> Settings:
    if fields.get("peft_type") != "LORA":
        raise _FieldError(f'peft_type must be "LORA", got {_shown(fields.get("peft_type"))}: {_OTHERWISE}')
    for name in fields.keys() - _READ - _WITHOUT_EFFECT:
        if fields[name] not in (None, False, {}, [], ""):
            raise _FieldError(f"{printable(name)} is not supported, got {_shown(fields[name])}: {_OTHERWISE}")
    _one_of(fields, "init_lora_weights", _INITIAL)
    _one_of(fields, "bias", _BIAS)
    layers = fields.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise _FieldError(f"layers_to_transform must be a whole number, a list of some, or null, got {_shown(layers)}")
    base, targets, excluded = (
        fields.get(name) for name in ("base_model_name_or_path", "target_modules", "exclude_modules")
    )
    return Settings(
        where,
        base if isinstance(base, str) and base else None,
        _rank(fields.get("r", 8), "r"),
        _number(fields.get("lora_alpha", 8), "lora_alpha"),
        _one_of(fields, "use_rslora", (None, False, True)) is True,
        {name: _rank(value, "rank_pattern") for name, value in _patterns(fields, "rank_pattern").items()},
        {name: _number(value, "alpha_pattern") for name, value in _patterns(fields, "alpha_pattern").items()},
        None if isinstance(targets, str) else _names(fields, "target_modules"),
        () if isinstance(excluded, str) else _names(fields, "exclude_modules"),
        _regular(_names(fields, "modules_to_save"), "modules_to_save"),
        tuple(layers) if layers else None,
        _regular(_names(fields, "layers_pattern"), "layers_pattern"),
        _parameters(fields),
    )


_OTHERWISE = "merge the adapter with the PEFT library (`merge_and_unload`, then `save_pretrained`)"


def _shown(value: Any) -> str:
    return printable(repr(value))


def _one_of(fields: Mapping[str, Any], name: str, choices: tuple[Any, ...]) -> Any:
    value = fields.get(name)
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        listed = printable_list([repr(choice) for choice in choices if choice is not None], len(choices))
        raise _FieldError(f"{name} must be one of {listed}, got {_shown(value)}: {_OTHERWISE}")
    return value


def _rank(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_RANK:
        raise _FieldError(f"{name} must be a whole number in 1..{_MOST_RANK}, got {_shown(value)}")
    return value


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e30:  # also refuses NaN
        raise _FieldError(f"{name} must be a finite number, got {_shown(value)}")
    return float(value)


def _patterns(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise _FieldError(f"{name} must be an object of numbers by names of modules, got {_shown(value)}")
    _regular(tuple(value), name)
    return value


def _names(fields: Mapping[str, Any], name: str) -> Names:
    value = fields.get(name)
    value = [value] if isinstance(value, str) and value else value or []
    if not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
        raise _FieldError(f"{name} must be a list of texts or null, got {_shown(value)}")
    return tuple(value)


def _parameters(fields: Mapping[str, Any]) -> Names:
    names = _names(fields, "target_parameters")
    for name in names:
        if name.rpartition(".")[2] not in _PARAMETERS:
            listed = ", ".join(_PARAMETERS)
            raise _FieldError(f"target_parameters must end with one of {listed}, got {_shown(name)}: {_OTHERWISE}")
    return names


def _regular(patterns: Names, name: str) -> Names:
    """The regular expressions, if they are such and their search is quick."""
    for pattern in patterns:
        repeats = len(re.findall(r"[*+{]", pattern))
        is_nested = re.search(r"\)\s*[*+{?]|\\[1-9]|\(\?[^:]", pattern) is not None
        if len(pattern) > _MOST_CHARACTERS or repeats > _MOST_REPEATS or is_nested:
            raise _FieldError(
                f"{name} has the pattern {_shown(pattern)}: at most {_MOST_CHARACTERS} characters, {_MOST_REPEATS} "
                "repetitions, and none of a group, are allowed"
            )
        try:
            re.compile(f"({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise _FieldError(f"{name} has {_shown(pattern)}, which is no regular expression: {error}") from None
    return patterns
