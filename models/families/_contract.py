"""What one model family is: data that tells how its Hugging Face files describe a decodax model.

All families share one block (`models/transformer.py`), one config reader (`models/hf_config.py`) and one loader
(`models/checkpoint.py`). A family file says what its `config.json` leaves unsaid and what its tensors are called.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from decodax.layers.feed_forward import FeedForward
from decodax.layers.mixers._contract import Mixer
from decodax.models.config import BlockConfig, ModelConfig, Residual
from decodax.models.families._layer import Fields, Layer, attention, gated_mlp
from decodax.models.sources import Layouts, renamed, whole

ParameterPath = tuple[str, ...]  # the keys that lead to one parameter

EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"

# A block's weights in the files: decodax's path in a block -> Hugging Face's name in a layer, or the layouts in which a
# weight may be stored that is not one tensor as it is (`models/sources.py`).
BlockTensors = Mapping[str, str | Layouts]
# A block's weights in the files of nearly every family: decodax's path in a block -> Hugging Face's name in a layer.
BLOCK_TENSORS: BlockTensors = MappingProxyType(
    {
        "mixer_norm/weight": "input_layernorm.weight",
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
        "feed_forward/gate": "mlp.gate_proj.weight",
        "feed_forward/up": "mlp.up_proj.weight",
        "feed_forward/down": "mlp.down_proj.weight",
        "feed_forward/gate_bias": "mlp.gate_proj.bias",
        "feed_forward/up_bias": "mlp.up_proj.bias",
        "feed_forward/down_bias": "mlp.down_proj.bias",
    }
)


@dataclass(frozen=True)
class NextLayerNames:
    """What the tensors of a layer that predicts one token further (`models/next_layer.py`) are called.

    prefix: in front of all of them, with {} for the number of the model's layers; a block's names follow it as in any
        layer. parts: of the rest, decodax's path -> the name behind the prefix.
    copies: what stands there beside them and is the model's own, as a regular expression.
    """

    prefix: str
    parts: BlockTensors
    copies: str

    def elsewhere(self, prefix: str) -> str:
        """A regular expression for the names of tensors that are not the layer's; `prefix` has its number."""
        return rf"(?!{re.escape(prefix)}).*|{re.escape(prefix)}(?:{self.copies})"


@dataclass(frozen=True)
class Family:
    """`model_type` is the family's name in `config.json`; the rest is what that file does not say.

    defaults: the fields that this family's class and code in transformers read, with their values for absent ones
        (None: derived from others, or without `nullable` needed in every file). What is done about all other fields of
        a file says `models/hf_unread_fields.py`.
    nullable: those that may be null, which then says "none", "no" or "derive it", as in transformers.
    aliases: other names of fields -> those in `defaults`; where a file gives both they must agree.
    ignored: fields without influence that only this family's files carry.
    fixed: fields that must have this value, or be absent: no other is implemented.
    same_as: fields that must be what another field is, or be absent.
    layer_kind: (fields, index) -> the kind of that layer, where `layer_types` does not say: "full_attention",
        "sliding_attention" (limited to the window) or another of `kinds`.
    qkv_bias, out_bias, mlp_bias: true, false, or the name of the boolean field that says so.
    score_scale_field: the field whose inverse square root scales the scores, in place of the head size.
    block_tensors: where a block's weights are stored; a function of the block where its sizes, or its kind, say so.
    elsewhere: config -> a regular expression for the names of stored tensors that belong to a part which is loaded
        separately (`open_part` in `models/checkpoint.py`). None: all tensors are the model's.
    next_layer: the names in a layer that predicts one token further, where checkpoints may have one.
    rotary_size: the field that says how many coordinates of a head rotate; None: all, or the part that the file says.
    default_rope: the `rope_scaling` of a config without one.
    mixer, feed_forward: what makes those parts of a block, where they are not plain attention and a gated MLP.
    residuals: (layer) -> how the two parts of a block are added.
    embedding_scale, logit_scale: (fields) -> what multiplies the embeddings and the logits.
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
    head_norms: bool = False
    unit_offset_norms: bool = False
    post_norms: bool = False
    rotary_size: str | None = None
    default_rope: Mapping[str, Any] | None = None
    mixer: Callable[[Layer], Mixer] = attention
    feed_forward: Callable[[Layer], FeedForward] = gated_mlp
    residuals: Callable[[Layer], tuple[Residual, Residual]] = lambda layer: (Residual(), Residual())
    embedding_scale: Callable[[Fields], float] = lambda fields: 1.0
    logit_scale: Callable[[Fields], float] = lambda fields: 1.0
    block_tensors: BlockTensors | Callable[[BlockConfig], BlockTensors] = field(default_factory=lambda: BLOCK_TENSORS)
    elsewhere: Callable[[ModelConfig], str] | None = None
    next_layer: NextLayerNames | None = None

    def layouts(self, config: ModelConfig) -> dict[ParameterPath, Layouts]:
        """Where every parameter of this model may be stored; the whole checkpoint."""
        layouts: dict[ParameterPath, Layouts] = {("embedding",): whole(EMBEDDING_NAME)}
        if config.tie_embeddings:  # stored once, under either name
            layouts["embedding",] += whole(HEAD_NAME)
        else:
            layouts["head",] = whole(HEAD_NAME)
        layouts["final_norm", "weight"] = whole("model.norm.weight")
        for index, block in enumerate(config.blocks):
            for path, stored in self._block_layouts(block, config.hidden_size).items():
                layouts[f"blocks_{index}", *path] = renamed(stored, f"model.layers.{index}.")
        return layouts

    def next_layer_layouts(self, config: ModelConfig) -> dict[ParameterPath, Layouts]:
        """Where the parameters of the first layer behind the model's own may be stored; its block is like the last.

        Raises ValueError for a family whose checkpoints have none.
        """
        if self.next_layer is None:
            raise ValueError(
                f"{self.model_type} models have no layer that predicts further tokens: take another strategy "
                "(`decodax methods` lists them)"
            )
        layouts = {tuple(path.split("/")): _layouts(name) for path, name in self.next_layer.parts.items()}
        for path, stored in self._block_layouts(config.blocks[-1], config.hidden_size).items():
            layouts["block", *path] = stored
        prefix = self.next_layer.prefix.format(config.num_layers)
        return {path: renamed(stored, prefix) for path, stored in layouts.items()}

    def _block_layouts(self, block: BlockConfig, hidden_size: int) -> dict[ParameterPath, Layouts]:
        """Where a block's parameters may be stored, by their names in a layer."""
        tensors = self.block_tensors(block) if callable(self.block_tensors) else self.block_tensors
        return {path: _layouts(tensors["/".join(path)]) for path in _paths(block.weights(hidden_size))}

    def tensor_names(self, config: ModelConfig) -> dict[str, ParameterPath]:
        """Hugging Face's name of every tensor of this model -> its path in the parameters.

        Raises ValueError where a parameter is not one stored tensor as it is.
        """
        names: dict[str, ParameterPath] = {}
        for path, (first, *_) in self.layouts(config).items():
            if first != whole(first[0].name)[0]:
                raise ValueError(
                    f"{self.model_type} checkpoints cannot be written: {'/'.join(path)} is stored in parts"
                )
            names[first[0].name] = path
        return names


def _layouts(stored: str | Layouts) -> Layouts:
    return whole(stored) if isinstance(stored, str) else stored


def _paths(tree: Mapping[str, Any]) -> list[ParameterPath]:
    """The paths to all leaves of a nested dictionary, in its order."""
    paths: list[ParameterPath] = []
    for name, value in tree.items():
        paths += [(name, *rest) for rest in _paths(value)] if isinstance(value, Mapping) else [(name,)]
    return paths
