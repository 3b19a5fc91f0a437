"""Defines `AdaptedSource`: a model with LoRA adapters, as a source of tensors like a model's own folder.

A head that is tied to the embedding becomes a tensor of its own if an adapter changes one of the two, which is what
PEFT trained.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.adapters.files import Adapter, open_adapter
from decodax.models.checkpoints.adapters.merging import merged_tensors
from decodax.models.checkpoints.model_files import has_orbax_arrays, parse_json_object
from decodax.models.checkpoints.model_source import ModelSource
from decodax.models.checkpoints.name_map import NameMaps
from decodax.models.checkpoints.name_map_selection import Expected, Match, tensor_names
from decodax.models.checkpoints.name_prefix import TensorNames, find_names
from decodax.models.checkpoints.safetensors_files import Entry
from decodax.models.config import ModelConfig
from decodax.models.families.contract import Family, ParameterPath
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
    name_maps: of the model's parameters.
    """

    base: ModelSource
    adapters: tuple[Adapter, ...]
    names: tuple[TensorNames, ...]
    tied: tuple[str, str] | None
    name_maps: Mapping[ParameterPath, NameMaps]

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

    def holds_weights(self) -> bool:
        return self.base.holds_weights()

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
        for adapter, names in zip(self.adapters, self.names, strict=True):
            match = replace(match, tensors=merged_tensors(adapter, names, match, self.name_maps, stored))
        return match

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
    name_maps = family.name_maps(replace(config, tie_embeddings=False))
    expected = tensor_names(name_maps)
    names = tuple(find_names(adapter.tensor_names, expected, family.body_prefix) for adapter in adapters)
    tied = (family.outer_name("head"), family.outer_name("embedding"))
    changed = {
        own.expected(name) for adapter, own in zip(adapters, names, strict=True) for name in adapter.tensor_names
    }
    is_split = config.tie_embeddings and not changed.isdisjoint(tied)
    source = AdaptedSource(base, adapters, names, tied if is_split else None, name_maps)
    return source, replace(config, tie_embeddings=config.tie_embeddings and not is_split)
