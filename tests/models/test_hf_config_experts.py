"""Configs of models with experts, latent attention and recurrent layers: field names, rules by layer, errors."""

import math

import pytest

from decodax.layers.feed_forward import ClampedSwiGLU, GatedMLPConfig
from decodax.layers.mixers.gated_delta import GatedDeltaConfig
from decodax.layers.mixers.lightning import LightningConfig
from decodax.layers.moe.layer import MoEConfig
from decodax.layers.rope import YarnScaling
from decodax.models.config import Residual
from decodax.models.configs.hf_config import read_config

SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 41,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def config_of(model_type, **fields):
    return read_config({"model_type": model_type, **SIZES, **fields})[1]


def feed_forwards(model_type, **fields):
    return [block.feed_forward.layer for block in config_of(model_type, **fields).blocks]


def windows_of(model_type, **fields):
    return [block.mixer.layer.window for block in config_of(model_type, **fields).blocks]


def test_fields_have_several_names():
    """transformers 5 writes num_local_experts where it reads num_experts, and the other way round."""
    latent = {"n_routed_experts": 6, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 0}
    for model_type, fields in {
        "qwen3_moe": {"num_local_experts": 6},
        "mixtral": {"num_experts": 6},
        "deepseek_v3": {"num_local_experts": 6, **latent},
    }.items():
        config = config_of(model_type, num_experts_per_tok=2, **fields)
        assert config.blocks[0].feed_forward.layer.router.num_experts == 6
    with pytest.raises(ValueError, match=r"num_experts_per_tok must be in 1..6 \(num_local_experts\), got 8"):
        config_of("qwen3_moe", num_local_experts=6)
    with pytest.raises(ValueError, match=r"num_local_experts and num_experts mean the same and differ: got 8 and 6"):
        config_of("qwen3_moe", num_experts=6, num_local_experts=8)


def test_which_layers_have_experts():
    def kinds(*arguments, **fields):
        return [isinstance(feed_forward, MoEConfig) for feed_forward in feed_forwards(*arguments, **fields)]

    assert kinds("qwen2_moe", decoder_sparse_step=2) == [False, True, False, True]
    assert kinds("qwen3_moe", mlp_only_layers=[0, 3]) == [False, True, True, False]
    assert kinds("deepseek_v2", num_experts_per_tok=6, first_k_dense_replace=3) == [False, False, False, True]
    assert kinds("deepseek_v3") == [False, False, False, True]
    assert feed_forwards("deepseek_v3")[0] == GatedMLPConfig(41)
    shared = feed_forwards("deepseek_v2", num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=7)[0]
    assert (shared.intermediate_size, shared.shared) == (7, GatedMLPConfig(14))
    assert feed_forwards("deepseek_v2", num_experts_per_tok=6, n_shared_experts=0)[0].shared is None


def test_windows():
    assert windows_of("mixtral") == [None] * 4 and windows_of("mixtral", sliding_window=9) == [9] * 4
    off = {"use_sliding_window": False, "sliding_window": 0}  # as transformers writes it
    assert windows_of("qwen2_moe", **off) == [None] * 4
    on = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}
    assert windows_of("qwen2_moe", **on) == [9, None, 9, None]
    assert windows_of("qwen3_moe", use_sliding_window=True, sliding_window=9) == [9] * 4
    assert windows_of("gpt_oss") == [128, None, 128, None]


def test_gpt_oss_scales_positions_by_default():
    mixer = config_of("gpt_oss").blocks[0].mixer.layer
    assert mixer.positions.scaling == YarnScaling(32.0, 4096, 0.1 * math.log(32) + 1, truncate=False)
    assert (mixer.positions.base, mixer.sinks, mixer.qkv_bias, mixer.out_bias) == (150000.0, True, True, True)
    plain = config_of("gpt_oss", rope_parameters={"rope_type": "default", "rope_theta": 5000.0}).blocks[0].mixer.layer
    assert plain.positions.scaling is None and plain.positions.base == 5000.0
    assert feed_forwards("gpt_oss", swiglu_limit=3.0)[0].activation == ClampedSwiGLU(1.702, 3.0)


def test_yarn_scales_latent_scores():
    sizes = {"qk_nope_head_dim": 12, "qk_rope_head_dim": 4}
    plain = config_of("deepseek_v3", **sizes).blocks[0].mixer.layer
    assert plain.scale == 16**-0.5 and plain.rope.rotary_size == 4 and plain.rope.interleaved
    yarn = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 64}
    scaled = config_of("deepseek_v3", **sizes, rope_scaling=yarn).blocks[0].mixer.layer
    assert scaled.scale == pytest.approx(16**-0.5 * (0.05 * math.log(40) + 1) ** 2)


def test_layers_without_attention():
    blocks = config_of("qwen3_next", head_dim=16).blocks
    assert [isinstance(block.mixer.layer, GatedDeltaConfig) for block in blocks] == [True, True, True, False]
    assert blocks[3].mixer.layer.positions.rotary_size == 4 and blocks[3].mixer.layer.output_gate
    assert (
        config_of("qwen3_next", head_dim=16, partial_rotary_factor=0.5).blocks[3].mixer.layer.positions.rotary_size == 8
    )
    kinds = ["linear_attention", "full_attention"] * 2
    factors = {"linear_attn_alpha_factor": 3.5, "mlp_beta_factor": 0.5}
    blocks = config_of("minimax", layer_types=kinds, **factors).blocks
    assert [isinstance(block.mixer.layer, LightningConfig) for block in blocks] == [True, False] * 2
    assert blocks[0].mixer.residual == Residual(3.5, 1.0, after_norm=True)
    assert blocks[1].feed_forward.residual == Residual(1.0, 0.5, after_norm=True)
    slopes = [block.mixer.layer.slopes[0] for block in blocks[::2]]
    assert slopes[0] == pytest.approx(2 ** (-8 / 6), rel=1e-4) and slopes[1] == pytest.approx(slopes[0] / 3, rel=1e-3)


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("deepseek_v3", {"n_group": 7}, "n_routed_experts must be a multiple of n_group, got 256 and 7"),
        ("deepseek_v3", {"n_group": 64, "topk_group": 1}, "the groups kept must hold at least num_experts_per_tok = 8"),
        ("mixtral", {"num_experts_per_tok": 9}, r"num_experts_per_tok must be in 1..8 \(num_local_experts\), got 9"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts must be a whole number from 1 to 16,384, got 0"),
        ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func must be "sigmoid" or absent, got "softmax"'),
        ("deepseek_v2", {"num_experts_per_tok": 6, "moe_layer_freq": 2}, "moe_layer_freq must be 1 or absent, got 2"),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            r"topk_method must be one of \['greedy', 'group_limited_greedy'\]",
        ),
        ("minimax", {"layer_types": ["sliding_attention"] * 4}, "'full_attention' or 'linear_attention'"),
        (
            "qwen3_next",
            {"linear_num_value_heads": 33},
            "linear_num_value_heads must be a multiple of linear_num_key_heads",
        ),
        (
            "qwen3_next",
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor must be a positive number, at most 1, got 1.5",
        ),
        ("olmoe", {"clip_qkv": -1}, "clip_qkv must be a positive number, at most 1e[+]30, got -1"),
    ],
)
def test_inconsistent_fields_are_refused(model_type, fields, expected):
    with pytest.raises(ValueError, match=expected):
        config_of(model_type, **fields)
