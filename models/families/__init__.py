"""The model families that decodax reads; a new one is a file here and a line below."""

from decodax.models.families import gemma2, llama, mistral, qwen2, qwen3
from decodax.models.families._contract import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        gemma2,
        llama,
        mistral,
        qwen2,
        qwen3,
    )
}
