"""Lists the model families that decodax reads, by the `model_type` of their configs; one per file of that name."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods

if TYPE_CHECKING:
    from decodax.models.families.contract import Family

_NAMES = (
    "bloom",
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "lfm2",
    "llama",
    "minimax",
    "minimax_m2",
    "ministral3",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
FAMILIES: "Mapping[str, Family]" = Methods(__name__, dict.fromkeys(_NAMES, "FAMILY"))
