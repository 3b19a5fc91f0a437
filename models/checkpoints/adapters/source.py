"""Defines `AdaptedSource`: a model with LoRA adapters, as a source of tensors like a model's own folder.

A head that is tied to the embedding becomes a tensor of its own if an adapter changes one of the two, which is what
PEFT trained.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decodax.core.printable import printable, printable_list
from decodax.models.checkpoints.adapters.files import Adapter, LowRank, open_adapter
from decodax.models.checkpoints.adapters.merged_tensor import MergedTensor
from decodax.models.checkpoints.formats.contract import Unreadable
from decodax.models.checkpoints.model_files import has_orbax_arrays, parse_json_object
from decodax.models.checkpoints.model_source import ModelSource
from decodax.models.checkpoints.name_map_selection import Expected, Match, tensor_names
from decodax.models.checkpoints.name_prefix import TensorNames, find_names
from decodax.models.checkpoints.safetensors_files import Entry
from decodax.models.checkpoints.weight_formats import StoredTensor
from decodax.models.config import ModelConfig
from decodax.models.families.contract import Family
from decodax.models.tokenizers.tokenizer import Tokenizer

_TIED = "tie_word_embeddings"
_CONFIG = "config.json"


@dataclass(frozen=True, eq=False)
class AdaptedSource:
    """A model's source, and adapters that are merged into its tensors in order, each into the last one's result.

    base: the model's source.
    adapters: in order.
    names: of each adapter, the prefixes of its names.
    tied: the names of the head and of the embedding, if the base has one tensor for both that now must be two.
    """

    base: ModelSource
    adapters: tuple[Adapter, ...]
    names: tuple[TensorNames, ...]
    tied: tuple[str, str] | None

    @property
    def path(self) -> Path:
        return self.base.path

    def where(self, name: str) -> str:
        return self.base.where(name)

    def read(self, name: str) -> bytes | None:
        content = self.base.read(name)
        if self.tied is None or name != _CONFIG or content is None:
            return content
        config = parse_json_object(content, self.where(name))
        nested = config.get("text_config")
        if isinstance(nested, dict):
            config["text_config"] = nested | {_TIED: False}
        return (json.dumps(config | {_TIED: False}, indent=2) + "\n").encode()

    def small_files(self) -> tuple[str, ...]:
        return self.base.small_files()

    def weight_files(self) -> list[Path]:
        return self.base.weight_files()

    def tensors(self) -> Mapping[str, Entry]:
        """The stored tensors of the base; `with_own_head` and `merged` add what the adapters change."""
        return self.base.tensors()

    def tokenizer(self) -> Tokenizer | None:
        return self.base.tokenizer()

    def with_own_head(self, stored: Mapping[str, Entry], expected: Expected) -> Mapping[str, Entry]:
        """The stored tensors, with the one of head and embedding under both names if they are tied no longer."""
        if self.tied is None:
            return stored
        names = find_names(stored, tensor_names(expected.name_maps), expected.body_prefix)
        both = [names.in_file(name) for name in self.tied]
        found = [stored[name] for name in both if name in stored]
        return {**stored, **{name: found[0] for name in both if found and name not in stored}}

    def merged(self, match: Match, stored: Mapping[str, Entry]) -> Match:
        """The match with the tensors that the adapters change in place of those of the base.

        Raises ValueError for a tensor of an adapter that does not fit the model.
        Warns of modules that an adapter should change but has no matrices for.
        """
        slices = {one.name: one for name_map in match.nearest.values() for one in name_map}
        tensors = dict(match.tensors)
        for adapter, names in zip(self.adapters, self.names, strict=True):
            for own, tensor in adapter.whole.items():
                name = match.names.in_file(names.expected(own))
                base = _base(adapter, own, name, tensor.shape, tensors, stored)
                if tensor.shape != base.shape:
                    raise _mismatch(adapter, f"{printable(own)} {list(tensor.shape)}", base)
                tensors[name] = tensor
            for module, matrices in adapter.low_rank.items():
                name = match.names.in_file(names.expected(f"{module}.weight"))
                shape = (matrices.up.shape[0], matrices.down.shape[1])
                base = _base(adapter, f"{module}.weight", name, shape, tensors, stored)
                is_transposed = matrices.is_embedding or slices[name].transposed
                tensors[name] = _sum(adapter, module, matrices, base, is_transposed=is_transposed)
            single = {match.names.expected(name) for name, one in slices.items() if one.at is None}
            _warn_of_unchanged(
                adapter, {names.in_file(name): tensors.get(match.names.in_file(name)) for name in single}
            )
        return replace(match, tensors=tensors)

    def described(self) -> list[dict[str, Any]]:
        """The adapters for a manifest: names, sizes and modification times of their files."""
        return [
            {
                "name": adapter.folder.resolve().name,
                "files": {
                    file.name: {"num_bytes": file.stat().st_size, "modified_ns": file.stat().st_mtime_ns}
                    for file in adapter.files
                },
            }
            for adapter in self.adapters
        ]


def adapted(
    base: ModelSource, family: Family, config: ModelConfig, folders: Sequence[Path]
) -> tuple[AdaptedSource, ModelConfig]:
    """The model of a source with the adapters in these folders, and its config, which may have another head.

    Raises FileNotFoundError for a missing file.
    Raises ValueError for what is no adapter that can be merged, and for a base in Orbax's form.
    """
    if has_orbax_arrays(base.path):
        raise ValueError(
            f"{printable(base.path)} is an Orbax checkpoint, whose arrays do not have the names that a LoRA adapter "
            "names: load the Hugging Face folder that it was made from with the adapter, or convert that folder with "
            "`decodax convert --adapter`"
        )
    adapters = tuple(open_adapter(folder) for folder in folders)
    expected = tensor_names(family.name_maps(replace(config, tie_embeddings=False)))
    names = tuple(find_names(adapter.tensor_names, expected, family.body_prefix) for adapter in adapters)
    tied = (family.outer_name("head"), family.outer_name("embedding"))
    changed = {
        own.expected(name) for adapter, own in zip(adapters, names, strict=True) for name in adapter.tensor_names
    }
    is_split = config.tie_embeddings and not changed.isdisjoint(tied)
    source = AdaptedSource(base, adapters, names, tied if is_split else None)
    return source, replace(config, tie_embeddings=config.tie_embeddings and not is_split)


def _base(
    adapter: Adapter,
    own: str,
    name: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, StoredTensor],
    stored: Mapping[str, Entry],
) -> StoredTensor:
    """The model's tensor that an adapter's changes."""
    if name in tensors:
        return tensors[name]
    is_stored = name in stored and not isinstance(stored[name], Unreadable)
    reason = "which decodax does not use" if is_stored else "which the model does not have"
    raise ValueError(
        f"the adapter in {printable(adapter.folder)} changes {printable(own)} {list(shape)}, {reason}: {adapter.origin}"
    )


def _mismatch(adapter: Adapter, what: str, base: StoredTensor) -> ValueError:
    return ValueError(
        f"the adapter in {printable(adapter.folder)} has {what}, and the model's {base.label} is {list(base.shape)}: "
        f"{adapter.origin}"
    )


def _sum(adapter: Adapter, module: str, matrices: LowRank, base: StoredTensor, *, is_transposed: bool) -> MergedTensor:
    up, down = (tensor.array(tensor.dtype) for tensor in (matrices.up, matrices.down))
    left, right = (down.T, up.T) if is_transposed else (up, down)
    if base.shape != (len(left), right.shape[1]):
        shape = [len(left), right.shape[1]]
        raise _mismatch(adapter, f"matrices for {printable(module)} {shape}", base)
    mappings = {id(one): one for tensor in (base, matrices.up, matrices.down) for one in tensor.mappings}
    label = f"{base.label} with the adapter in {printable(adapter.folder)}"
    return MergedTensor(base, left, right, matrices.scale, label, tuple(mappings.values()))


def _warn_of_unchanged(adapter: Adapter, tensors: Mapping[str, Any]) -> None:
    """Warns if the settings name matrices of the model for which the adapter has none."""
    settings = adapter.settings
    if settings.targets is None:
        return
    missing = [
        name
        for name, tensor in tensors.items()
        if tensor is not None and len(tensor.shape) == 2 and name.endswith(".weight")
        if settings.changes(name.removesuffix(".weight")) and name.removesuffix(".weight") not in adapter.low_rank
    ]
    if missing:
        warnings.warn(
            f"{settings.where} names modules for which the adapter has no matrices, they stay as they are in the "
            f"model: {printable_list(sorted(missing))}; download the adapter again if this is not meant",
            stacklevel=6,
        )
