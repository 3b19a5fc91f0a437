"""Reading config.json: both spellings, every default, and a refusal that lists all that is not understood."""

import json
import math

import pytest

from decodax.layers.rope import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from decodax.models.families import FAMILIES
from decodax.models.hf_config import load_config, read_config

SIZES = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 41,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def config_of(model_type="llama", **fields):
    return read_config({"model_type": model_type, **SIZES, **fields})[1]


def mixer_of(model_type="llama", **fields):
    return config_of(model_type, **fields).blocks[0].mixer


def windows_of(model_type, **fields):
    return [block.mixer.window for block in config_of(model_type, **fields).blocks]


# What transformers 5 (and 4) assume when config.json says no more than the sizes.
# (context, base, eps, activation, tied, head size, window of each layer, scale, softcaps)
DEFAULTS = {
    "llama": (2048, 1e4, 1e-6, "silu", False, 8, [None] * 3, 8**-0.5, (None, None)),
    "mistral": (131072, 1e4, 1e-6, "silu", False, 8, [4096] * 3, 8**-0.5, (None, None)),
    "qwen2": (32768, 1e4, 1e-6, "silu", False, 8, [None] * 3, 8**-0.5, (None, None)),
    "qwen3": (32768, 1e4, 1e-6, "silu", False, 128, [None] * 3, 128**-0.5, (None, None)),
    "gemma2": (8192, 1e4, 1e-6, "gelu_tanh", True, 256, [4096, None, 4096], 256**-0.5, (50.0, 30.0)),
}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults(model_type):
    config = config_of(model_type)
    mixer = config.blocks[0].mixer
    assert DEFAULTS[model_type] == (
        config.max_position_embeddings,
        mixer.rope.base,
        config.final_norm.eps,
        config.blocks[0].feed_forward.activation,
        config.tie_embeddings,
        mixer.head_size,
        [block.mixer.window for block in config.blocks],
        mixer.scale,
        (mixer.softcap, config.logit_softcap),
    )
    assert mixer.rope.scaling is None and mixer.rope.rotary_size == mixer.head_size
    assert (mixer.qkv_bias, mixer.out_bias) == (model_type == "qwen2", False)
    assert (mixer.head_norm is not None) == (model_type == "qwen3")
    assert config.embedding_scale == (math.sqrt(48) if model_type == "gemma2" else 1.0)


def test_null_derives_heads_and_switches_features_off():
    mixer = mixer_of("mistral", num_key_value_heads=None, head_dim=None, sliding_window=None, rope_scaling=None)
    assert (mixer.num_kv_heads, mixer.head_size, mixer.window, mixer.rope.scaling) == (6, 8, None, None)
    config = config_of("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None, rms_norm_eps=None)
    assert (config.blocks[0].mixer.softcap, config.logit_softcap, config.final_norm.eps) == (None, None, 1e-6)


def test_windows():
    assert windows_of("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1) == [None, 9, 9]
    assert windows_of("qwen3", use_sliding_window=False, sliding_window=9, max_window_layers=1) == [None] * 3
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows_of("qwen3", use_sliding_window=True, sliding_window=9, layer_types=kinds) == [9, None, 9]
    assert windows_of("gemma2", sliding_window=5, layer_types=kinds[1:] + kinds[1:2]) == [None, 5, None]
    assert windows_of("llama", layer_types=["full_attention"] * 3, sliding_window=None) == [None] * 3


# (rope type, its settings, fields beside them) -> (scaling, context of a model with max_position_embeddings 64)
SCALINGS = [
    ("default", {}, {}, None, 64),
    ("linear", {"factor": 3.0}, {}, LinearScaling(3.0), 192),
    ("dynamic", {"factor": 3}, {}, DynamicScaling(3.0, 64), 192),
    (
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        {},
        Llama3Scaling(8.0, 1.0, 4.0, 32),
        64,
    ),
    (
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        {"original_max_position_embeddings": 16},
        Llama3Scaling(8.0, 1.0, 4.0, 16),
        64,
    ),
    ("yarn", {"factor": 4.0}, {}, YarnScaling(4.0, 64, 0.1 * math.log(4) + 1), 256),
    (
        "yarn",
        {
            "factor": None,
            "original_max_position_embeddings": 16,
            "attention_factor": 0.5,
            "beta_fast": 9,
            "beta_slow": 2,
        },
        {},
        YarnScaling(4.0, 16, 0.5, 9.0, 2.0),
        64,
    ),
    (
        "yarn",
        {"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.9, "truncate": False},
        {},
        YarnScaling(4.0, 64, (0.07 * math.log(4) + 1) / (0.19 * math.log(4) + 1), truncate=False),
        256,
    ),
    (
        "longrope",
        {"short_factor": [1, 2, 3, 4], "long_factor": [5, 6, 7, 8]},
        {"original_max_position_embeddings": 16},
        LongRopeScaling((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0), 16, math.sqrt(1 + math.log(4) / math.log(16))),
        64,
    ),
    (
        "longrope",
        {
            "short_factor": [1, 2, 3, 4],
            "long_factor": [5, 6, 7, 8],
            "original_max_position_embeddings": 16,
            "factor": 1.0,
        },
        {},
        LongRopeScaling((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0), 16, 1.0),
        64,
    ),
]


@pytest.mark.parametrize("spelling", ["4, type", "4, rope_type", "5"])
@pytest.mark.parametrize(("kind", "settings", "beside", "scaling", "context"), SCALINGS)
def test_rope_scaling_in_every_spelling(kind, settings, beside, scaling, context, spelling):
    fields = {"max_position_embeddings": 64, **beside}
    if spelling == "5":
        fields["rope_parameters"] = {"rope_type": kind, "rope_theta": 500.0, **settings}
    else:
        fields |= {"rope_theta": 500.0, "rope_scaling": {spelling.removeprefix("4, "): kind, **settings}}
    config = config_of(**fields)
    rope = config.blocks[0].mixer.rope
    assert (rope.base, rope.scaling, config.max_position_embeddings) == (500.0, scaling, context)


def test_fields_without_influence_pass():
    config = config_of(
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
        pretraining_tp=2,
        attention_dropout=0.1,
        eos_token_id=[1, 2],
        quantization_config=None,
        rope_interleaved=False,
        something_new=None,
    )
    assert config == config_of()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"qk_clip": 3.0}, "qk_clip = 3.0 is not understood"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be null or absent"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0 or absent, got 0.5"),
        ({"sliding_window": 5}, "sliding_window must be null or absent, got 5"),
        ({"hidden_act": "relu"}, "hidden_act must be one of .*'silu'.*got 'relu'"),
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1 on, got 0"),
        ({"hidden_size": "48"}, "hidden_size must be a whole number from 1 on, got '48'"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number, got -1.0"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": 47}, "head_dim is needed"),
        ({"num_key_value_heads": 4}, "num_heads must be a multiple of num_kv_heads, got 6 and 4"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types must be absent or"),
        ({"rope_theta": "big"}, "rope_theta must be a positive number, got 'big'"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_type must be one of .*'yarn'.*got 'spiral'"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type must be one of"),
        ({"rope_scaling": {"type": "linear"}}, r"rope scaling 'linear' needs \['factor'\]"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "alpha": 1}}, r"does not understand: \['alpha'\]"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor in the rope scaling must be a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null"),
        ({"rope_scaling": {"factor": 2.0}}, r"rope scaling 'default' has fields .*'factor'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be 1",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 3}},
            "rope_scaling and rope_parameters are both given and differ",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1, 1, 1]}},
            r"short_factor must be a list of 4 positive numbers \(half the head size\), got 2",
        ),
        (
            {"original_max_position_embeddings": "x", "rope_scaling": {"type": "yarn"}},
            "original_max_position_embeddings",
        ),
    ],
)
def test_refusals(fields, expected):
    with pytest.raises(ValueError, match=expected):
        config_of(**fields)


def test_sliding_layers_need_a_window():
    with pytest.raises(ValueError, match=r"'sliding_attention' need sliding_window"):
        config_of("qwen2", use_sliding_window=False, layer_types=["sliding_attention"] * 3)
    with pytest.raises(ValueError, match=r"layer_types must hold 3 times"):
        config_of("qwen2", layer_types=["full_attention"] * 2)


def test_all_problems_are_listed_together():
    with pytest.raises(ValueError) as caught:
        read_config({"model_type": "llama", **SIZES, "vocab_size": None, "alpha": 1, "beta": 2, "head_dim": 0})
    for name in ("vocab_size is missing", "alpha = 1", "beta = 2", "head_dim must be"):
        assert name in str(caught.value)


def test_unknown_family_names_the_known_ones():
    with pytest.raises(ValueError, match=r"model_type must be one of .*'gemma2'.*'llama'.*got 'mamba'"):
        read_config({"model_type": "mamba", **SIZES})
    with pytest.raises(ValueError, match=r"got None"):
        read_config(SIZES)


def test_load_config_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_config(tmp_path)
    for content, expected in [("{", "no valid JSON"), ("[]", "must hold a JSON object"), ('{"a": 1}', "model_type")]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=expected) as caught:
            load_config(tmp_path)
        assert str(tmp_path / "config.json") in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    assert load_config(tmp_path)[0] is FAMILIES["llama"]
