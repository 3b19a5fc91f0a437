"""Names the tensors of a block as Megatron-LM's descendants store them: each head's query, key and value together."""

from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.checkpoints.name_map import fused_rows
from decodax.models.config import BlockConfig
from decodax.models.families.contract import BLOCK_TENSORS, BlockTensors


def fused_head_tensors(block: BlockConfig, attention: str) -> BlockTensors:
    """The tensor names of a block of GPT-NeoX or BLOOM; `attention` is the name of its attention layer."""
    mixer = block.mixer.layer
    assert isinstance(mixer, GQAConfig)
    sizes_of_head: dict[str, int] = dict.fromkeys(("mixer/query", "mixer/key", "mixer/value"), mixer.head_size)
    biases = {f"{name}_bias": size for name, size in sizes_of_head.items()}
    return {
        **BLOCK_TENSORS,
        **fused_rows(f"{attention}.query_key_value.weight", sizes_of_head),
        **fused_rows(f"{attention}.query_key_value.bias", biases),
        "mixer/out": f"{attention}.dense.weight",
        "mixer/out_bias": f"{attention}.dense.bias",
        "feed_forward/up": "mlp.dense_h_to_4h.weight",
        "feed_forward/up_bias": "mlp.dense_h_to_4h.bias",
        "feed_forward/down": "mlp.dense_4h_to_h.weight",
        "feed_forward/down_bias": "mlp.dense_4h_to_h.bias",
    }
