"""Reads `adapter_config.json`: the rank and scale of each module, and which modules the adapter changes.

LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; the fields are those of `LoraConfig` of the PEFT
library. A field that is not known here must be null, false or empty: it could change what the tensors mean.

A regular expression of `target_modules` or `exclude_modules` is not evaluated (its search could take for ever): PEFT
stores tensors of the modules that it matched, and of no others.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.adapters.fields import (
    OTHERWISE,
    FieldError,
    Names,
    by_pattern,
    finite,
    one_of,
    read_rank,
    regular,
    shown,
    texts,
)
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
# Parameters of one module that PEFT wraps, the last outermost: as transformers' experts define them.
_PARAMETERS = ("weight", "gate_up_proj", "down_proj")
_INNER = ".base_layer"


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
    except FieldError as error:
        raise ValueError(f"{where}: {error}") from None


def _settings(fields: Mapping[str, Any], where: str) -> Settings:
    if fields.get("peft_type") != "LORA":
        raise FieldError(f'peft_type must be "LORA", got {shown(fields.get("peft_type"))}: {OTHERWISE}')
    for name in fields.keys() - _READ - _WITHOUT_EFFECT:
        value = fields[name]
        if value is not None and value is not False and value not in ({}, [], ""):
            raise FieldError(f"{printable(name)} is not supported, got {shown(value)}: {OTHERWISE}")
    one_of(fields, "init_lora_weights", _INITIAL)
    one_of(fields, "bias", _BIAS)
    layers = fields.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise FieldError(f"layers_to_transform must be a whole number, a list of some, or null, got {shown(layers)}")
    base, targets, excluded = (
        fields.get(name) for name in ("base_model_name_or_path", "target_modules", "exclude_modules")
    )
    return Settings(
        where,
        base if isinstance(base, str) and base else None,
        read_rank(fields.get("r", 8), "r"),
        finite(fields.get("lora_alpha", 8), "lora_alpha"),
        one_of(fields, "use_rslora", (None, False, True)) is True,
        {name: read_rank(value, "rank_pattern") for name, value in by_pattern(fields, "rank_pattern").items()},
        {name: finite(value, "alpha_pattern") for name, value in by_pattern(fields, "alpha_pattern").items()},
        None if isinstance(targets, str) else texts(fields, "target_modules"),
        () if isinstance(excluded, str) else texts(fields, "exclude_modules"),
        regular(texts(fields, "modules_to_save"), "modules_to_save"),
        tuple(layers) if layers else None,
        regular(texts(fields, "layers_pattern"), "layers_pattern"),
        _parameters(fields),
    )


def _parameters(fields: Mapping[str, Any]) -> Names:
    several = texts(fields, "target_parameters")
    for name in several:
        if name.rpartition(".")[2] not in _PARAMETERS:
            listed = ", ".join(_PARAMETERS)
            raise FieldError(f"target_parameters must end with one of {listed}, got {shown(name)}: {OTHERWISE}")
    return several
