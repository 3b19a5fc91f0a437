"""The model families that decodax reads; a new one is a file here and a line below."""

from decodax.models.families import gemma2, llama, mistral, qwen2, qwen3
from decodax.models.families._contract import Family

FAMILIES: dict[str, Family] = {
    "gemma2": gemma2.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
}
