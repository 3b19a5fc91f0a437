"""The model families that decodax reads; a new one is a file here and a line below."""

from decodax.models.families import (
    deepseek_v2,
    deepseek_v3,
    gemma2,
    gpt_oss,
    granitemoe,
    llama,
    minimax,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
)
from decodax.models.families._contract import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        deepseek_v2,
        deepseek_v3,
        gemma2,
        gpt_oss,
        granitemoe,
        llama,
        minimax,
        mistral,
        mixtral,
        olmoe,
        qwen2,
        qwen2_moe,
        qwen3,
        qwen3_moe,
        qwen3_next,
    )
}
