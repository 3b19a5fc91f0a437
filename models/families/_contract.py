"""What one model family is: data that tells how its Hugging Face files describe a decodax model.

All families share one block (`models/transformer.py`), one config reader (`models/hf_config.py`) and one loader
(`models/checkpoint.py`). A family file says what its `config.json` leaves unsaid and what its tensors are called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from decodax.models.config import ModelConfig

ParameterPath = tuple[str, ...]  # the keys that lead to one parameter

# A block's weights in the files of nearly every family: decodax's path in a block -> Hugging Face's name in a layer.
BLOCK_TENSORS: Mapping[str, str] = MappingProxyType(
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
class Family:
    """`model_type` is the family's name in `config.json`; the rest is what that file does not say.

    defaults: the fields this family reads beside the sizes that every config must give, with transformers' values for
        absent ones. A field that stands neither here nor among the harmless ones of `models/hf_config.py` is refused.
    ignored: fields without influence that only this family's files carry.
    slides: (fields, layer) -> whether that layer's attention is limited to the sliding window, where `layer_types` does
        not say. None: no layer is, whatever the file says.
    qkv_bias, out_bias, mlp_bias: true, false, or the name of the boolean field that says so.
    score_scale_field: the field whose inverse square root scales the scores, in place of the head size.
    """

    model_type: str
    defaults: Mapping[str, Any]
    ignored: frozenset[str] = frozenset()
    slides: Callable[[Mapping[str, Any], int], bool] | None = None
    activation_field: str = "hidden_act"
    score_scale_field: str | None = None
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_norms: bool = False
    unit_offset_norms: bool = False
    post_norms: bool = False
    scaled_embedding: bool = False
    block_tensors: Mapping[str, str] = field(default_factory=lambda: BLOCK_TENSORS)

    def tensor_names(self, config: ModelConfig) -> dict[str, ParameterPath]:
        """Hugging Face's name of every tensor of this model -> its path in the parameters; the whole checkpoint."""
        names: dict[str, ParameterPath] = {"model.embed_tokens.weight": ("embedding",)}
        for index, block in enumerate(config.blocks):
            for path in _paths(block.weights(config.hidden_size)):
                names[f"model.layers.{index}.{self.block_tensors['/'.join(path)]}"] = (f"blocks_{index}", *path)
        names["model.norm.weight"] = ("final_norm", "weight")
        if not config.tie_embeddings:
            names["lm_head.weight"] = ("head",)
        return names


def _paths(tree: Mapping[str, Any]) -> list[ParameterPath]:
    """The paths to all leaves of a nested dictionary, in its order."""
    paths: list[ParameterPath] = []
    for name, value in tree.items():
        paths += [(name, *rest) for rest in _paths(value)] if isinstance(value, Mapping) else [(name,)]
    return paths
