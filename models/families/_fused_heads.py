"""Names the tensors of a block as Megatron-LM's descendants store them: each head's queries, key and value together."""

from decodax.layers.mixers.gqa import GQAConfig
from decodax.models.checkpoints.name_map import fused_rows
from decodax.models.config import BlockConfig
from decodax.models.families.contract import BLOCK_TENSORS, BlockTensors


def fused_head_tensors(block: BlockConfig, attention: str) -> BlockTensors:
    """The tensor names of a block of GPT-NeoX, BLOOM or Falcon; `attention` is the name of its attention layer.

    Rows of the queries of one key-value head, of its key and of its value alternate.
    """
    mixer = block.mixer.layer
    assert isinstance(mixer, GQAConfig)
    size, queries = mixer.head_size, mixer.num_heads // mixer.num_kv_heads
    sizes_of_head = {"mixer/query": queries * size, "mixer/key": size, "mixer/value": size}
    biases = {f"{name}_bias": rows for name, rows in sizes_of_head.items()}
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
