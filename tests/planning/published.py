"""Holds config.json of published models as in their repositories, without fields that do not influence a plan."""

from decodax.models.config import ModelConfig
from decodax.models.configs.hf_config import read_config
from tests.models.test_published_sizes import PUBLISHED

_LLAMA_3_1 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
}
FIELDS = {
    "Llama-3.1-8B": _LLAMA_3_1
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3.1-70B": _LLAMA_3_1
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "DeepSeek-V3": PUBLISHED["DeepSeek-V3, arXiv 2412.19437"][0],  # and R1, which has its shape
}


def config_of(name: str, **changed: int) -> ModelConfig:
    return read_config(FIELDS[name] | changed)[1]
