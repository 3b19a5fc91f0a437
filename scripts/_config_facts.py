"""Reads the facts of a model of transformers from its modules: sizes, scales, windows, experts, rotation.

`tests/config_facts.py` reads the same facts from a `ModelConfig`.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any


def facts_of(model: Any, windows: list[int | None]) -> dict[str, Any]:
    """The facts of a model of transformers; `windows` is what `windows_by_rule` or `windows_by_mask` gave."""
    config, inner = model.config, model.model
    scale = getattr(inner.embed_tokens, "scalar_embed_scale", getattr(inner, "embedding_multiplier", 1.0))
    return {
        "vocabulary": inner.embed_tokens.weight.shape[0],
        "hidden": inner.embed_tokens.weight.shape[1],
        "tied": bool(config.tie_word_embeddings),
        "context": config.max_position_embeddings,
        "eps": eps_of(inner.norm),
        "embedding_scale": number(scale),
        "logit_scale": number(1 / getattr(model, "logits_scaling", 1.0)),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        "rope": rope_facts(inner.rotary_emb, config),
        "layers": [layer_facts(layer, config, window) for layer, window in zip(inner.layers, windows, strict=True)],
    }


def number(value: float) -> float:
    """Seven digits: what float32 holds."""
    return float(f"{float(value):.6e}")


def eps_of(norm: Any) -> float:
    return number(getattr(norm, "eps", getattr(norm, "variance_epsilon", None)))


def frequency_facts(frequencies: list[float]) -> list[float]:
    """How many frequencies there are, four of them, and their sum."""
    count = len(frequencies)
    chosen = [frequencies[index] for index in (0, min(1, count - 1), count // 2, count - 1)]
    return [count, *(float(f"{item:.4e}") for item in (*chosen, sum(frequencies)))]


def rope_facts(rotary: Any, config: Any) -> dict[str, Any]:
    """The frequencies of a short row and of one of twice the context, and the factor on cos and sin."""
    import torch

    fresh = type(rotary)(config=config)  # the model may be on device meta, without memory
    facts = {}
    for name, length in (("short", 2), ("long", 2 * config.max_position_embeddings)):
        fresh(torch.zeros(1, 1, 1), torch.tensor([[length - 1]]))
        facts[name] = frequency_facts(fresh.inv_freq.tolist())
    return {**facts, "magnitude": number(fresh.attention_scaling)}


def windows_by_rule(model: Any) -> list[int | None]:
    """The window of each layer, by the masks that the family's forward chooses."""
    config = model.config
    source = inspect.getsource(sys.modules[type(model).__module__])
    if '"sliding_attention"' in source:
        return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
    slides = "create_sliding_window_causal_mask" in source
    return [config.sliding_window if slides and hasattr(layer, "self_attn") else None for layer in model.model.layers]


def windows_by_mask(model: Any, num_tokens: int) -> list[int | None]:
    """The same, counted in the masks of one forward; None where the last token attends to all."""
    import torch

    masks: dict[int, Any] = {}

    def keep(index: int) -> Any:
        def hook(module: Any, positional: Any, named: Mapping[str, Any]) -> None:
            masks[index] = named.get("attention_mask", positional[1] if len(positional) > 1 else None)

        return hook

    hooks = [
        layer.self_attn.register_forward_pre_hook(keep(index), with_kwargs=True)
        for index, layer in enumerate(model.model.layers)
        if hasattr(layer, "self_attn")
    ]
    with torch.no_grad():
        model(torch.arange(num_tokens)[None] % model.config.vocab_size, use_cache=False)
    for hook in hooks:
        hook.remove()
    windows: list[int | None] = []
    for index in range(len(model.model.layers)):
        mask = masks.get(index)
        attended = num_tokens if mask is None or mask.ndim != 4 else int((mask[0, 0, -1] > -1).sum())
        windows.append(None if attended >= num_tokens else attended)
    return windows


def layer_facts(layer: Any, config: Any, window: int | None) -> dict[str, Any]:
    """One layer: its mixer, its feed-forward layer, and how the two are added."""
    return {
        "eps": eps_of(layer.input_layernorm),
        "mixer": mixer_facts(layer, config, window),
        "feed_forward": feed_forward_facts(layer, config),
        "residuals": residual_facts(layer, config),
    }


def residual_facts(layer: Any, config: Any) -> list[float]:
    """Keep and add of the mixer, then of the feed-forward layer."""
    if hasattr(layer, "mlp_alpha_factor"):
        names = ("attn_alpha_factor", "attn_beta_factor", "mlp_alpha_factor", "mlp_beta_factor")
        return [number(getattr(layer, name)) for name in names]
    add = number(getattr(layer, "residual_multiplier", 1.0))
    return [1.0, add, 1.0, add]


def mixer_facts(layer: Any, config: Any, window: int | None) -> dict[str, Any]:
    """The facts of attention, latent attention, lightning attention or the gated delta rule."""
    if hasattr(layer, "linear_attn"):
        mixer = layer.linear_attn
        return {
            "kind": "delta",
            "heads": [mixer.num_k_heads, mixer.num_v_heads],
            "sizes": [mixer.head_k_dim, mixer.head_v_dim, mixer.conv_kernel_size],
            "eps": eps_of(mixer.norm),
        }
    mixer = layer.self_attn
    if hasattr(mixer, "block_size"):
        return {"kind": "lightning", "heads": mixer.num_attention_heads, "size": mixer.head_dim}
    if hasattr(mixer, "kv_lora_rank"):
        return {
            "kind": "latent",
            "heads": mixer.num_heads,
            "sizes": [mixer.qk_nope_head_dim, mixer.qk_rope_head_dim, mixer.v_head_dim],
            "ranks": [mixer.q_lora_rank, mixer.kv_lora_rank],
            "scale": number(mixer.scaling),
            "bias": mixer.o_proj.bias is not None,
            "interleaved": bool(getattr(config, "rope_interleave", True)),
        }
    norm = getattr(mixer, "q_norm", None)
    gated = config.model_type == "qwen3_next"
    return {
        "kind": "attention",
        "heads": [mixer.q_proj.weight.shape[0] // mixer.head_dim // (2 if gated else 1), mixer.k_proj.weight.shape[0]
                  // mixer.head_dim],
        "size": mixer.head_dim,
        "scale": number(mixer.scaling),
        "biases": [mixer.q_proj.bias is not None, mixer.o_proj.bias is not None],
        "norm": None if norm is None else norm.weight.shape[0],
        "window": window,
        "softcap": getattr(mixer, "attn_logit_softcapping", None),
        "clip": getattr(config, "clip_qkv", None) if config.model_type == "olmoe" else None,
    }  # fmt: skip


def activation_fact(module: Any) -> float:
    """An activation's value at 1, which tells the activations apart."""
    import torch

    return float(f"{module(torch.ones(())).item():.4f}")


def feed_forward_facts(layer: Any, config: Any) -> dict[str, Any]:
    """The facts of a gated MLP, or of experts and their router."""
    module = getattr(layer, "mlp", getattr(layer, "block_sparse_moe", None))
    experts = getattr(module, "experts", None)
    if experts is None:
        bias = module.down_proj.bias is not None
        return {"width": module.intermediate_size, "activation": activation_fact(module.act_fn), "bias": bias}
    router = getattr(module, "gate", getattr(module, "router", None))
    shared = getattr(module, "shared_experts", getattr(module, "shared_expert", None))
    always = config.model_type in ("mixtral", "minimax", "gpt_oss", "granitemoe")
    grouped = getattr(router, "topk_method", "group_limited_greedy") == "group_limited_greedy"
    groups = [router.num_group, router.topk_group] if hasattr(router, "num_group") and grouped else [None, None]
    own = config.model_type == "gpt_oss"
    return {
        "experts": router.num_experts,
        "per_token": router.top_k,
        "width": experts.intermediate_size if own else experts.intermediate_dim,
        "activation": [experts.alpha, experts.limit] if own else activation_fact(experts.act_fn),
        "renormalise": always or bool(getattr(router, "norm_topk_prob", False)),
        "scale": number(getattr(router, "routed_scaling_factor", 1.0)),
        "groups": groups,
        "shared": 0 if shared is None else shared.intermediate_size,
    }
