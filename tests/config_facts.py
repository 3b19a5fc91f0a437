"""Collects the values that a `ModelConfig` computes with, as scripts/_config_facts.py does for transformers models."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from decodax.layers.feed_forward import ACTIVATIONS, ClampedSwiGLU, GatedMLPConfig
from decodax.layers.mixers.gated_delta import GatedDeltaConfig
from decodax.layers.mixers.gqa import GQAConfig
from decodax.layers.mixers.lightning import LightningConfig
from decodax.layers.mixers.mla import MLAConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.routers.top_k import TopK
from decodax.layers.rope import DynamicScaling, LongRopeScaling, Rope
from decodax.models.config import BlockConfig, ModelConfig


def facts_of(config: ModelConfig, max_position_embeddings: int) -> dict[str, Any]:
    """The facts; a row of twice `max_position_embeddings` is the long one of the rotation."""
    ropes = [
        getattr(block.mixer.layer, "rope", None) or block.mixer.layer.positions
        for block in config.blocks
        if isinstance(block.mixer.layer, GQAConfig | MLAConfig)
    ]
    return {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "tied": config.tie_embeddings,
        "context": config.max_position_embeddings,
        "eps": number(config.final_norm.eps),
        "embedding_scale": number(config.embedding.scale),
        "logit_scale": number(config.head.scale),
        "logit_softcap": config.head.softcap,
        "rope": rope_facts(ropes[0], max_position_embeddings) if ropes else None,
        "layers": [layer_facts(block) for block in config.blocks],
    }


def number(value: float) -> float:
    return float(f"{float(value):.6e}")


def frequency_facts(frequencies: list[float]) -> list[float]:
    count = len(frequencies)
    chosen = [frequencies[index] for index in (0, min(1, count - 1), count // 2, count - 1)]
    return [count, *(float(f"{item:.4e}") for item in (*chosen, sum(frequencies)))]


def rope_facts(rope: Rope, max_position_embeddings: int) -> dict[str, Any]:
    scaling = rope.scaling
    if scaling is None:
        facts = frequency_facts(rope.plain_frequencies().tolist())
        return {"short": facts, "long": facts, "magnitude": 1.0}
    facts = {}
    for name, length in (("short", 2), ("long", 2 * max_position_embeddings)):
        frequencies = np.asarray(scaling.frequencies(rope, jnp.full((1, 1), length, jnp.int32)), np.float64)
        facts[name] = frequency_facts(frequencies.reshape(-1).tolist())
    if not isinstance(scaling, DynamicScaling | LongRopeScaling):
        assert facts["short"] == facts["long"]
    return {**facts, "magnitude": number(scaling.attention_factor)}


def layer_facts(block: BlockConfig) -> dict[str, Any]:
    mixer, feed_forward = block.mixer.residual, block.feed_forward.residual
    return {
        "eps": number(block.mixer.norm.eps),
        "mixer": mixer_facts(block.mixer.layer),
        "feed_forward": feed_forward_facts(block.feed_forward.layer),
        "residuals": [number(value) for value in (mixer.keep, mixer.add, feed_forward.keep, feed_forward.add)],
    }


def mixer_facts(mixer: Any) -> dict[str, Any]:
    if isinstance(mixer, GatedDeltaConfig):
        return {
            "kind": "delta",
            "heads": [mixer.num_key_heads, mixer.num_value_heads],
            "sizes": [mixer.key_size, mixer.value_size, mixer.convolution_width],
            "eps": number(mixer.norm.eps),
        }
    if isinstance(mixer, LightningConfig):
        return {"kind": "lightning", "heads": mixer.num_heads, "size": mixer.head_size}
    if isinstance(mixer, MLAConfig):
        return {
            "kind": "latent",
            "heads": mixer.num_heads,
            "sizes": [mixer.nope_size, mixer.rope.rotary_size, mixer.value_size],
            "ranks": [mixer.query_rank, mixer.latent_rank],
            "scale": number(mixer.scale),
            "bias": mixer.bias,
            "interleaved": mixer.rope.interleaved,
        }
    assert isinstance(mixer, GQAConfig)
    norms = mixer.head_norms
    return {
        "kind": "attention",
        "heads": [mixer.num_heads, mixer.num_kv_heads],
        "size": mixer.head_size,
        "scale": number(mixer.scale),
        "biases": [mixer.qkv_bias, mixer.out_bias],
        "norm": None if norms is None else mixer.head_size * (mixer.num_heads if norms.across_heads else 1),
        "window": mixer.window,
        "softcap": mixer.softcap,
        "clip": mixer.clip,
    }


def feed_forward_facts(mlp: Any) -> dict[str, Any]:
    if isinstance(mlp, GatedMLPConfig):
        return {"width": mlp.intermediate_size, "activation": activation_fact(mlp.activation), "bias": mlp.bias}
    assert isinstance(mlp, MoEConfig) and isinstance(mlp.router, TopK)
    router = mlp.router
    return {
        "experts": router.num_experts,
        "per_token": router.experts_per_token,
        "width": mlp.intermediate_size,
        "activation": activation_fact(mlp.activation),
        "renormalise": router.renormalise,
        "scale": number(router.scale),
        "groups": [router.num_groups, router.num_groups_kept],
        "shared": 0 if mlp.shared is None else mlp.shared.intermediate_size,
    }


def activation_fact(activation: Any) -> float | list[float]:
    if isinstance(activation, ClampedSwiGLU):
        return [activation.alpha, activation.limit]
    if activation not in _AT_ONE:
        _AT_ONE[activation] = float(f"{float(ACTIVATIONS[activation](np.float32(1.0))):.4f}")
    return _AT_ONE[activation]


_AT_ONE: dict[str, float] = {}  # activations at 1: each is compiled once
