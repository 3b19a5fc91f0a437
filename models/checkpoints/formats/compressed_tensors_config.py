"""Reads the `quantization_config` of compressed-tensors: groups of modules, and the scheme of each group's weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.formats.fields import choice, empty, require_known, size, texts

_WHERE = "with quant_method compressed-tensors"
_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
    "mixed-precision",  # each group has its own
)
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_CONSECUTIVE, _ORDERED = (None, False, "weight", "static"), ("group", "dynamic", True)  # values of actorder
_UNSUPPORTED = ("transform_config", "moe_sparsity_config")
_FIELDS = frozenset(
    {
        *("quant_method", "format", "config_groups", "ignore", "quantization_status", "sparsity_config"),
        *("global_compression_ratio", "version"),
        "kv_cache_scheme",  # how a program may round the cache; here it has the model's dtype
        *_UNSUPPORTED,
    }
)
_GROUP_FIELDS = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
_WEIGHT_FIELDS = frozenset(
    {
        *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder"),
        *("scale_dtype", "zp_dtype", "is_mx"),
        *("observer", "observer_kwargs"),  # how the scales were found
    }
)
_REGULAR = "re:"
_MOST_CHARACTERS, _MOST_REPEATS = 200, 4  # of a pattern and of a name: a longer search could take for ever
_EMBEDDING = "embed_tokens"


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group of modules are stored.

    bits, type: of a code; "int" or "float".
    symmetric: there are no zero points.
    strategy: what shares a scale: "tensor", "channel", "group", "tensor_group" or "block".
    group_size: inputs that share a scale with "group" and "tensor_group".
    block: (outputs, inputs) that share a scale with "block".
    ordered: the groups are of inputs that are not consecutive (activation ordering).
    """

    bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int = 0
    block: tuple[int, int] = (0, 0)
    ordered: bool = False

    @property
    def is_nvfp4(self) -> bool:
        return self.type == "float" and self.bits == 4


@dataclass(frozen=True)
class Settings:
    """What the config says of the modules.

    groups: (targets, scheme); a target is a name, a class, or a regular expression after "re:".
    ignore: the modules that are plain, likewise.
    """

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a module; None if its weights are plain."""
        if any(_is_meant(module, target) for target in self.ignore):
            return None
        found = (scheme for targets, scheme in self.groups if any(_is_meant(module, target) for target in targets))
        return next(found, None)


def _is_meant(module: str, target: str) -> bool:
    if target.startswith(_REGULAR):
        is_short = len(module) <= _MOST_CHARACTERS
        return is_short and re.match(target.removeprefix(_REGULAR), module) is not None
    is_embedding = module.rpartition(".")[2] == _EMBEDDING
    return target == module or target == ("Embedding" if is_embedding else "Linear")


def read_settings(field: Mapping[str, Any]) -> Settings:
    """The settings in the field; ValueError for what is not supported."""
    require_known(field, _FIELDS, f"quantization_config {_WHERE}")
    empty(field, _UNSUPPORTED, _WHERE)
    choice(field, "format", _FORMATS, "mixed-precision", _WHERE)
    choice(field, "quantization_status", ("compressed", "frozen"), "compressed", _WHERE)  # older files say "frozen"
    sparsity = field.get("sparsity_config")
    if sparsity not in (None, {}) and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        raise ValueError(
            f"quantization_config.sparsity_config must be null, empty or of format dense {_WHERE}, got "
            f"{printable(repr(sparsity))}: use a checkpoint whose weights are not sparse"
        )
    groups = field.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(
            f"quantization_config.config_groups must be an object of groups {_WHERE}, got {printable(repr(groups))}"
        )
    ignore = texts(field, "ignore", _WHERE)
    _check_patterns(ignore)
    return Settings(tuple(_group(name, group) for name, group in groups.items()), ignore)


def _group(name: str, group: Any) -> tuple[tuple[str, ...], Scheme]:
    where = f"in group {printable(name)} of config_groups"
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise ValueError(f"quantization_config must have an object weights {where}, got {printable(repr(group))}")
    require_known(group, _GROUP_FIELDS, f"quantization_config {where}")
    choice(group, "format", (*_FORMATS, None), None, where)
    targets = texts(group, "targets", where)
    _check_patterns(targets)
    return targets, _scheme(group["weights"], where)


def _scheme(weights: Mapping[str, Any], where: str) -> Scheme:
    require_known(weights, _WEIGHT_FIELDS, f"quantization_config {where}")
    empty(weights, ("dynamic", "is_mx"), where)
    type_ = choice(weights, "type", ("int", "float"), "int", where)
    bits = choice(weights, "num_bits", (4, 8), 8, where)
    symmetric = choice(weights, "symmetric", (True, False), True, where)
    group_size = weights.get("group_size")
    implied = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    strategy = choice({"strategy": weights.get("strategy") or implied}, "strategy", _STRATEGIES, None, where)
    if type_ == "float" and not symmetric:
        raise ValueError(f"quantization_config.symmetric must be true for type float {where}, got False")
    if (type_ == "float" and bits == 4) != (strategy == "tensor_group"):
        raise ValueError(
            f"quantization_config.strategy must be tensor_group {where} for float of 4 bits (NVFP4), and for nothing "
            f"else, got {strategy} for {type_} of {bits} bits"
        )
    if strategy == "block":
        block = weights.get("block_structure")
        if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise ValueError(
                f"quantization_config.block_structure must be two whole numbers from 1 on {where}, got "
                f"{printable(repr(block))}"
            )
        return Scheme(bits, type_, symmetric, strategy, block=(block[0], block[1]))
    if strategy in ("group", "tensor_group"):
        ordered = choice(weights, "actorder", (*_CONSECUTIVE, *_ORDERED), None, where) in _ORDERED
        group_size = size(weights, "group_size", None, where)
        return Scheme(bits, type_, symmetric, strategy, group_size, ordered=ordered)
    return Scheme(bits, type_, symmetric, strategy)


def _check_patterns(targets: tuple[str, ...]) -> None:
    """Raises ValueError for a regular expression that is wrong, or whose search could take for ever."""
    for target in targets:
        if not target.startswith(_REGULAR):
            continue
        pattern = target.removeprefix(_REGULAR)
        repeats = len(re.findall(r"[*+{]", pattern))
        is_nested = re.search(r"\)\s*[*+{?]|\\[1-9]|\(\?", pattern) is not None
        if len(pattern) > _MOST_CHARACTERS or repeats > _MOST_REPEATS or is_nested:
            raise ValueError(
                f"quantization_config has the pattern {printable(repr(pattern))}: at most {_MOST_CHARACTERS} "
                f"characters, {_MOST_REPEATS} repetitions, and none of a group, are allowed"
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"quantization_config has {printable(repr(pattern))}, which is no regular expression: {error}"
            ) from None
