"""Defines `Family`, the data that maps a family's Hugging Face files to a decodax model.

All families share one block (`models/transformer.py`), one config reader (`models/configs/hf_config.py`) and one loader
(`models/checkpoints/reading.py`). A family file gives what `config.json` does not say, and the names of its tensors.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from decodax.layers.feed_forward import FeedForward
from decodax.layers.mixers.contract import Mixer
from decodax.layers.norm import Norm
from decodax.models.checkpoints.name_map import NameMaps, renamed, single_tensor
from decodax.models.config import BlockConfig, ModelConfig
from decodax.models.embedding import EmbeddingConfig
from decodax.models.families.layer import (
    Fields,
    Layer,
    attention,
    gated_mlp,
    plain_embedding,
    plain_head,
    pre_norm,
    rms_norm,
)
from decodax.models.head import HeadConfig

ParameterPath = tuple[str, ...]  # the keys that lead to one parameter

# What is around the layers, in the files of nearly every family: decodax's path -> Hugging Face's name.
# Several names are alternatives, of which the first is written.
OUTER_TENSORS: Mapping[str, str | tuple[str, ...]] = MappingProxyType(
    {
        "embedding": "model.embed_tokens.weight",
        "final_norm/weight": "model.norm.weight",
        "final_norm/bias": "model.norm.bias",
        "head": "lm_head.weight",
        "head_bias": "lm_head.bias",
    }
)
# A block's weights in the files: decodax's path in a block -> Hugging Face's name in a layer, or the name maps of a
# weight that is not one tensor as it is (`models/checkpoints/name_map.py`).
BlockTensors = Mapping[str, str | NameMaps]
# A block's weights in the files of nearly every family: decodax's path in a block -> Hugging Face's name in a layer.
BLOCK_TENSORS: BlockTensors = MappingProxyType(
    {
        "mixer_norm/weight": "input_layernorm.weight",
        "mixer_norm/bias": "input_layernorm.bias",
        "mixer/query": "self_attn.q_proj.weight",
        "mixer/key": "self_attn.k_proj.weight",
        "mixer/value": "self_attn.v_proj.weight",
        "mixer/out": "self_attn.o_proj.weight",
        "mixer/query_bias": "self_attn.q_proj.bias",
        "mixer/key_bias": "self_attn.k_proj.bias",
        "mixer/value_bias": "self_attn.v_proj.bias",
        "mixer/out_bias": "self_attn.o_proj.bias",
        "mixer/query_norm/weight": "self_attn.q_norm.weight",
        "mixer/key_norm/weight": "self_attn.k_norm.weight",
        "feed_forward_norm/weight": "post_attention_layernorm.weight",
        "feed_forward_norm/bias": "post_attention_layernorm.bias",
        "feed_forward/gate": "mlp.gate_proj.weight",
        "feed_forward/up": "mlp.up_proj.weight",
        "feed_forward/down": "mlp.down_proj.weight",
        "feed_forward/gate_bias": "mlp.gate_proj.bias",
        "feed_forward/up_bias": "mlp.up_proj.bias",
        "feed_forward/down_bias": "mlp.down_proj.bias",
    }
)


@dataclass(frozen=True)
class MTPHeadNames:
    """The tensor names of an MTP head (`models/mtp_head.py`).

    prefix: of all names, with {} for the number of the model's layers; a block's names follow it as in any layer.
    tensors: of the rest, decodax's path -> the name after the prefix.
    copies: names there of copies of the model's own tensors, as a regular expression.
    """

    prefix: str
    tensors: BlockTensors
    copies: str

    def elsewhere(self, prefix: str) -> str:
        """A regular expression for the names of tensors that are not the head's; `prefix` has the layer's number."""
        return rf"(?!{re.escape(prefix)}).*|{re.escape(prefix)}(?:{self.copies})"


@dataclass(frozen=True)
class Family:
    """A model family: what its `config.json` and its tensors mean.

    model_type: the family's name in `config.json`; the other fields are what that file does not say.
    defaults: the fields that this family's class and code in transformers read, with their values for absent ones
        (None: derived from others, or without `nullable` required in every file). `models/configs/unread_fields.py`
        handles all other fields of a file.
    nullable: those that may be null, which then means "none", "no" or "derive it", as in transformers.
    aliases: other names of fields -> those in `defaults`; where a file gives both they must agree.
    ignored: fields without influence that only this family's files carry.
    fixed: fields that must have this value, or be absent: no other is implemented.
    same_as: fields that must be what another field is, or be absent.
    layer_kind: (fields, index) -> the kind of that layer, if `layer_types` is absent: "full_attention",
        "sliding_attention" (limited to the window) or another of `kinds`.
    kinds: of layers that the family may have.
    activation_field: the field with the activation.
    score_scale_field: the field whose inverse square root scales the scores, in place of the head size.
    qkv_bias, out_bias, mlp_bias: true, false, or the name of the boolean field with the answer.
    head_norms: whether each head's queries and keys are normed: true, false, or the name of the boolean field.
    rotary_size: the field with the number of coordinates of a head that rotate; None: all, or the share in the file.
    default_rope: the `rope_scaling` of a config without one.
    interleaved_rope: whether the pairs that rotate are neighbours: true, false, or the name of the field.
    rope_keys: keys of the rope dictionary that mean something else than its rotation.
    rope_by_kind: the kinds of layers that rotate each in its own way -> the base where the rope dictionary gives none,
        or the field with it. `rope_scaling` of such a family is that of its full attention.
    head_sizes: kinds of layers whose head size is not `head_dim` -> the field with it.
    mixer, feed_forward: (layer) -> these of a block, where they are not plain attention and a gated MLP.
    norm: (fields) -> the model's norm.
    block: (layer) -> the block that mixer and feed-forward are parts of.
    final_norm: (fields) -> the norm before the head; None: that of the model.
    embedding, head: (fields) -> what comes before the layers and after them.
    derived: (fields) -> the value of a field that is null.
    unsupported: (fields) -> a line for each value that means something that is not implemented.
    outer_tensors: the tensor names of what is around the layers.
    layer_prefix: of the tensor names of a layer, with {} for its index.
    body_prefix: of all names but the head's, which files of a base model leave out.
    block_tensors: the tensor names of a block's weights; a function of the block if they depend on its sizes or kind.
    elsewhere: config -> a regular expression for the names of stored tensors that are loaded separately
        (`open_auxiliary_weights` in `models/checkpoints/reading.py`). None: all tensors are the model's.
    mtp_head: the names in an MTP head, if checkpoints may have one.
    """

    model_type: str
    defaults: Mapping[str, Any]
    nullable: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    fixed: Fields = field(default_factory=dict)
    same_as: Mapping[str, str] = field(default_factory=dict)
    layer_kind: Callable[[Fields, int], str] = lambda fields, index: "full_attention"
    kinds: frozenset[str] = frozenset({"full_attention", "sliding_attention"})
    activation_field: str = "hidden_act"
    score_scale_field: str | None = None
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_norms: bool | str = False
    rotary_size: str | None = None
    default_rope: Mapping[str, Any] | None = None
    interleaved_rope: bool | str = False
    rope_keys: frozenset[str] = frozenset()
    rope_by_kind: Mapping[str, str | float] | None = None
    head_sizes: Mapping[str, str] = field(default_factory=dict)
    mixer: Callable[[Layer], Mixer] = attention
    feed_forward: Callable[[Layer], FeedForward] = gated_mlp
    norm: Callable[[Fields], Norm] = rms_norm
    block: Callable[[Layer], BlockConfig] = pre_norm
    final_norm: Callable[[Fields], Norm | None] | None = None
    embedding: Callable[[Fields], EmbeddingConfig] = plain_embedding
    head: Callable[[Fields], HeadConfig] = plain_head
    derived: Mapping[str, Callable[[Fields], Any]] = field(default_factory=dict)
    unsupported: Callable[[Fields], list[str]] = lambda fields: []
    outer_tensors: Mapping[str, str | tuple[str, ...]] = field(default_factory=lambda: OUTER_TENSORS)
    layer_prefix: str = "model.layers.{}."
    body_prefix: str = "model."
    block_tensors: BlockTensors | Callable[[BlockConfig], BlockTensors] = field(default_factory=lambda: BLOCK_TENSORS)
    elsewhere: Callable[[ModelConfig], str] | None = None
    mtp_head: MTPHeadNames | None = None

    def name_maps(self, config: ModelConfig) -> dict[ParameterPath, NameMaps]:
        """The name maps of all parameters of this model, for the full checkpoint."""
        outer = {name: item for name, item in config.weights().items() if not name.startswith("blocks_")}
        name_maps = {path: self._outer_name_maps("/".join(path)) for path in _paths(outer)}
        if config.tie_embeddings:  # stored once, under either name
            name_maps["embedding",] += self._outer_name_maps("head")
        for index, block in enumerate(config.blocks):
            for path, stored in self._block_name_maps(block, config.hidden_size).items():
                name_maps[f"blocks_{index}", *path] = renamed(stored, self.layer_prefix.format(index))
        return name_maps

    def _outer_name_maps(self, path: str) -> NameMaps:
        names = self.outer_tensors[path]
        several = (names,) if isinstance(names, str) else names
        return tuple(name_map for name in several for name_map in single_tensor(name))

    def outer_name(self, path: str) -> str:
        """The tensor name of something around the layers, for messages."""
        return self._outer_name_maps(path)[0][0].name

    def mtp_head_name_maps(self, config: ModelConfig) -> dict[ParameterPath, NameMaps]:
        """The name maps of the parameters of the first MTP head; its block is like the model's last.

        Raises ValueError for a family whose checkpoints have none.
        """
        if self.mtp_head is None:
            raise ValueError(
                f"{self.model_type} models have no MTP head: take another strategy (`decodax methods` lists them)"
            )
        name_maps = {tuple(path.split("/")): _name_maps(name) for path, name in self.mtp_head.tensors.items()}
        for path, stored in self._block_name_maps(config.blocks[-1], config.hidden_size).items():
            name_maps["block", *path] = stored
        prefix = self.mtp_head.prefix.format(config.num_layers)
        return {path: renamed(stored, prefix) for path, stored in name_maps.items()}

    def _block_name_maps(self, block: BlockConfig, hidden_size: int) -> dict[ParameterPath, NameMaps]:
        """The name maps of a block's parameters, with their names in a layer."""
        tensors = self.block_tensors(block) if callable(self.block_tensors) else self.block_tensors
        return {path: _name_maps(tensors["/".join(path)]) for path in _paths(block.weights(hidden_size))}

    def tensor_names(self, config: ModelConfig) -> dict[str, ParameterPath]:
        """Hugging Face's name of every tensor of this model -> its path in the parameters.

        Raises ValueError if a parameter is not one stored tensor as it is.
        """
        names: dict[str, ParameterPath] = {}
        for path, (first, *_) in self.name_maps(config).items():
            if first != single_tensor(first[0].name)[0]:
                raise ValueError(
                    f"{self.model_type} checkpoints cannot be written: {'/'.join(path)} is stored in slices"
                )
            names[first[0].name] = path
        return names


def _name_maps(stored: str | NameMaps) -> NameMaps:
    return single_tensor(stored) if isinstance(stored, str) else stored


def _paths(tree: Mapping[str, Any]) -> list[ParameterPath]:
    """The paths to all leaves of a nested dictionary, in its order."""
    paths: list[ParameterPath] = []
    for name, value in tree.items():
        paths += [(name, *rest) for rest in _paths(value)] if isinstance(value, Mapping) else [(name,)]
    return paths
