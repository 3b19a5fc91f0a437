"""Configs of published models with experts have as many parameters, in all and active, as their papers say."""

import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks.bench_experts_gpu import SHAPES
from decodax.core.weight import Weight
from decodax.layers.moe.layer import MoEConfig
from decodax.models.configs.hf_config import read_config
from decodax.models.families import FAMILIES
from decodax.models.model import Model

# model -> (config.json, billions of parameters, billions of active parameters), both as published.
PUBLISHED = {
    "Mixtral 8x7B, arXiv 2401.04088": (
        {
            "model_type": "mixtral",
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        46.7,
        12.9,
    ),
    "Qwen3-30B-A3B, arXiv 2505.09388": (
        SHAPES["qwen3_30b"],
        30.5,
        3.3,
    ),
    "Qwen1.5-MoE-A2.7B": (
        {
            "model_type": "qwen2_moe",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        },
        14.3,
        2.7,
    ),
    "OLMoE-1B-7B, arXiv 2409.02060": (
        {
            "model_type": "olmoe",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
        },
        6.9,
        1.3,
    ),
    "DeepSeek-V2-Lite, arXiv 2405.04434": (
        SHAPES["deepseek_v2_lite"],
        15.7,
        2.4,
    ),
    "DeepSeek-V3, arXiv 2412.19437": (
        {
            "model_type": "deepseek_v3",
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
        },
        671,
        37,
    ),
    "gpt-oss-20b, arXiv 2508.10925": (
        {
            "model_type": "gpt_oss",
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_local_experts": 32,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
        },
        20.9,
        3.6,
    ),
    "MiniMax-Text-01, arXiv 2501.08313": (
        {
            "model_type": "minimax",
            "vocab_size": 200064,
            "hidden_size": 6144,
            "intermediate_size": 9216,
            "num_local_experts": 32,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "head_dim": 128,
            "layer_types": [*["linear_attention"] * 7, "full_attention"] * 10,
        },
        456,
        45.9,
    ),
    "Qwen3-Next-80B-A3B": (
        {
            "model_type": "qwen3_next",
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5120,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
        },
        80,
        3,
    ),
    "Qwen3.5-35B-A3B": ({"model_type": "qwen3_5_moe_text"}, 35, 3),
}


def num_parameters(tree):
    if isinstance(tree, Weight):
        return math.prod(tree.shape)
    return sum(map(num_parameters, tree.values()))


def idle_parameters(config):
    """Parameters of the experts that a token does not choose."""
    idle = 0
    for block in config.blocks:
        if isinstance(block.feed_forward.layer, MoEConfig):
            router = block.feed_forward.layer.router
            experts = num_parameters(block.feed_forward.layer.weights(config.hidden_size)["experts"])
            idle += experts * (router.num_experts - router.experts_per_token) // router.num_experts
    return idle


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_many_parameters_as_published(name):
    raw, total, active = PUBLISHED[name]
    config = read_config(raw)[1]
    billions = num_parameters(config.weights()) / 1e9
    assert billions == pytest.approx(total, abs=0.5 if isinstance(total, int) else 0.06)
    met = billions - idle_parameters(config) / 1e9
    # A token uses one row of the embedding; some published figures leave out the rest, and some the head, too.
    embedding = config.vocab_size * config.hidden_size / 1e9
    assert 0.9 * (met - 2 * embedding) < active < 1.1 * met


def test_every_family_with_experts_is_listed():
    named = {raw["model_type"] for raw, _, _ in PUBLISHED.values()}
    plain = {name for name in FAMILIES if not any("expert" in field for field in FAMILIES[name].defaults)}
    assert set(FAMILIES) - named - plain == {"granitemoe", "gemma4_text", "glm4_moe", "minimax_m2"}


def test_cache_of_deepseek_v3():
    """70,272 bytes a token in bfloat16: 576 numbers in each of 61 layers."""
    config = read_config(PUBLISHED["DeepSeek-V3, arXiv 2412.19437"][0])[1]

    def num_bytes(capacity):
        caches = jax.eval_shape(lambda: Model(config).empty_cache(1, capacity, jnp.bfloat16))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))

    assert num_bytes(129) - num_bytes(128) == 70_272 == (512 + 64) * 2 * 61


def test_state_of_a_recurrent_layer_does_not_grow():
    config = read_config(PUBLISHED["Qwen3-Next-80B-A3B"][0])[1]
    shapes = [jax.eval_shape(lambda c=c: Model(config).empty_cache(1, c, jnp.bfloat16)) for c in (128, 4096)]
    kinds = [type(cache).__name__ for cache in shapes[0]]
    assert kinds == [*["RecurrentCache"] * 3, "KVCache"] * 12
    for short, long in zip(*shapes, strict=True):
        same = [a.shape == b.shape for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True)]
        assert all(same) == (type(short).__name__ == "RecurrentCache")
