"""Describes Granite 3 (dense): Llama with four constant factors, of embeddings, scores, sums and logits."""

from decodax.models.families._granite import scaled_block, scaled_embedding, scaled_head, scaled_scores
from decodax.models.families.contract import Family
from decodax.models.families.layer import sizes

FAMILY = Family(
    model_type="granite",
    defaults={
        **sizes(32000, 4096, 11008, 32, 32),
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    mlp_bias="mlp_bias",
    mixer=scaled_scores,
    block=scaled_block,
    embedding=scaled_embedding,
    head=scaled_head,
)
