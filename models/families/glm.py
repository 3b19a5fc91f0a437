"""Describes GLM-4-9B: Llama with biases, fewer key-value heads, and neighbours in half of a head that rotate.

ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4 All Tools, arXiv 2406.12793.
"""

from decodax.models.families._glm import DEFAULTS, tensors
from decodax.models.families.contract import Family

FAMILY = Family(
    model_type="glm",
    defaults=DEFAULTS,
    interleaved_rope=True,
    qkv_bias="attention_bias",
    block_tensors=tensors,
)
