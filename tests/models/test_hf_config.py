"""Reading config.json: both spellings, every default, and an error that lists every unsupported field."""

import json
import math
from pathlib import Path

import pytest

from decodax.layers.rope import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from decodax.models.configs.hf_config import load_config, read_config
from decodax.models.families import FAMILIES

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
    return config_of(model_type, **fields).blocks[0].mixer.layer


def windows_of(model_type, **fields):
    return [block.mixer.layer.window for block in config_of(model_type, **fields).blocks]


# Defaults of transformers 5 (and 4) when config.json gives only the sizes.
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
    mixer = config.blocks[0].mixer.layer
    assert DEFAULTS[model_type] == (
        config.max_position_embeddings,
        mixer.positions.base,
        config.final_norm.eps,
        config.blocks[0].feed_forward.layer.activation,
        config.tie_embeddings,
        mixer.head_size,
        [block.mixer.layer.window for block in config.blocks],
        mixer.scale,
        (mixer.softcap, config.head.softcap),
    )
    assert mixer.positions.scaling is None and mixer.positions.rotary_size == mixer.head_size
    assert (mixer.qkv_bias, mixer.out_bias) == (model_type == "qwen2", False)
    assert (mixer.head_norms is not None) == (model_type == "qwen3")
    assert config.embedding.scale == (math.sqrt(48) if model_type == "gemma2" else 1.0)


# What `save_pretrained` writes of each class made without arguments, by the fields that decodax reads.
WRITTEN = json.loads((Path(__file__).parents[1] / "golden" / "configs" / "defaults.json").read_text("utf-8"))
REQUIRED = {"deepseek_v2": {"num_experts_per_tok": 2}, "gemma4_text": {"hidden_size_per_layer_input": 0}}
REQUIRED["glm4_moe"] = {"head_dim": 128}  # the class would make heads of 42.67 coordinates, of which half rotate


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_without_fields_is_the_class_in_transformers(model_type):
    required, written = REQUIRED.get(model_type, {}), WRITTEN[model_type]
    assert read_config({"model_type": model_type} | required)[1] == read_config(written | required)[1]
    for name, default in FAMILIES[model_type].defaults.items():
        if default is not None and written.get(name):  # not what another default switches off
            assert written[name] == (list(default) if isinstance(default, tuple) else default), name


def test_null_derives_heads_and_switches_features_off():
    mixer = mixer_of("mistral", num_key_value_heads=None, head_dim=None, sliding_window=None, rope_scaling=None)
    assert (mixer.num_kv_heads, mixer.head_size, mixer.window, mixer.positions.scaling) == (6, 8, None, None)
    config = config_of("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (config.blocks[0].mixer.layer.softcap, config.head.softcap) == (None, None)


def test_windows():
    assert windows_of("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1) == [None, 9, 9]
    assert windows_of("qwen3", use_sliding_window=False, sliding_window=9, max_window_layers=1) == [None] * 3
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows_of("qwen3", use_sliding_window=True, sliding_window=9, layer_types=kinds) == [9, None, 9]
    assert windows_of("gemma2", sliding_window=5, layer_types=kinds[1:] + kinds[1:2]) == [None, 5, None]
    assert windows_of("llama", layer_types=["full_attention"] * 3, sliding_window=None) == [None] * 3
    assert windows_of("exaone4", sliding_window=5, sliding_window_pattern="LG") == [5, None, 5]
    assert windows_of("exaone4", sliding_window=5, sliding_window_pattern="LLG", layer_types=kinds) == [5, None, 5]
    assert windows_of("exaone4", sliding_window=None, sliding_window_pattern=0) == [None] * 3


# (rope type, its settings, fields beside them) -> (scaling, context of a model with max_position_embeddings 64)
SCALINGS = [
    ("default", {}, {}, None, 64),
    # 64 is the product already, or the context is at least not larger: see test_context_of_linear_scaling
    ("linear", {"factor": 3.0, "original_max_position_embeddings": 20}, {}, LinearScaling(3.0), 64),
    ("dynamic", {"factor": 3, "original_max_position_embeddings": 20}, {}, DynamicScaling(3.0, 64), 64),
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
    (  # 0 is "not given" for these, and a null `truncate` is false, as in transformers
        "yarn",
        {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0, "beta_fast": 0, "beta_slow": 0.0, "truncate": None},
        {},
        YarnScaling(4.0, 64, 0.1 * math.log(4) + 1, 32.0, 1.0, truncate=False),
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
    rope = config.blocks[0].mixer.layer.positions
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
        ({"quantization_config": {"bits": 4}}, "quantization_config must be null or absent"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1 or absent, got 0.5"),
        ({"sliding_window": 5}, "sliding_window must be absent, got 5"),
        ({"is_causal": False}, "is_causal must be true or absent, got false"),
        ({"is_causal": None}, "is_causal must be true or absent, got null"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size must be absent, got 8192"),
        ({"use_logn_attn": True}, "use_logn_attn must be false or 0 or absent, got true"),
        ({"hidden_act": "mish"}, "hidden_act must be one of .*'silu'.*got \"mish\""),
        ({"hidden_act": ["silu"]}, r"hidden_act must be one of .*got \[\"silu\"\]"),
        ({"vocab_size": 0}, "vocab_size must be a whole number from 1 to 268,435,456, got 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 4,096, got 1000000000"),
        ({"hidden_size": "48"}, 'hidden_size must be a whole number from 1 to 1,048,576, got "48"'),
        ({"hidden_size": 48.0}, "hidden_size must be a whole number from 1 to 1,048,576, got 48.0"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number, at most 1e[+]30, got -1.0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number, at most 1e[+]30, got NaN"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number, at most 1e[+]30, got null"),
        ({"head_dim": 7}, r"head_dim .* must be even: .*, got 7"),
        ({"hidden_size": 47}, "head_dim is needed"),
        ({"num_key_value_heads": 4}, "num_attention_heads must be a multiple of num_key_value_heads, got 6 and 4"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types must be absent or"),
        ({"layer_types": [["full_attention"]] * 3}, "layer_types must be a list with the name of each layer"),
        ({"rope_theta": "big"}, 'rope_theta must be a number above 1, at most 1e[+]30, got "big"'),
        ({"rope_scaling": {"type": "spiral"}}, "rope_scaling.rope_type must be one of .*'yarn'.*got \"spiral\""),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling.rope_type must be one of"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 5}}, "rope_parameters.rope_type must be one of"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing: rope type linear needs factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 1}}, "rope_scaling.alpha must be absent, got 1"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor must be a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null"),
        ({"rope_scaling": False}, "rope_scaling must be an object or null, got false"),
        ({"rope_scaling": []}, "rope_scaling must be an object or null, got \\[\\]"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor must be 1 or absent, got 2.0"),
        ({"rope_scaling": {"long_factor": [1.0]}}, "rope_scaling.long_factor needs a rope_scaling.rope_type"),
        ({"rope_scaling": {"full_attention": {"rope_theta": 5}}}, "rope_scaling.full_attention must be absent"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor must be 1",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 3}},
            "rope_scaling and rope_parameters are both given and differ",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1, 1, 1]}},
            r"rope_scaling.short_factor must be a list of 4 positive numbers \(half the head size\), got a list of 2",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "rope_scaling.high_freq_factor must be above rope_scaling.low_freq_factor, got 4 and 4",
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
    wrong = {"vocab_size": None, "alibi": True, "qk_norm": True, "head_dim": 0, "rope_scaling": 5}
    with pytest.raises(ValueError) as caught:
        config_of(**wrong)
    for name in wrong:
        assert f"\n  - {name} must be" in str(caught.value)


def test_unknown_family_names_the_known_ones():
    with pytest.raises(ValueError, match=r"model_type must be one of .*`decodax methods` lists all\), got \"mamba\""):
        read_config({"model_type": "mamba", **SIZES})
    with pytest.raises(ValueError, match="got null"):
        read_config(SIZES)


def test_context_of_linear_scaling():
    """The smaller of two interpretations, and a warning about the other where the file is ambiguous."""
    for kind in ("linear", "dynamic"):
        settings = {"type": kind, "factor": 4.0}
        with pytest.warns(UserWarning, match=r"^the context is max_position_embeddings = 64 .*factor = 4, .*up to 256"):
            assert config_of(max_position_embeddings=64, rope_scaling=settings).max_position_embeddings == 64
        known = {**settings, "original_max_position_embeddings": 16}  # 64 is the product: no warning
        assert config_of(max_position_embeddings=64, rope_scaling=known).max_position_embeddings == 64
        assert config_of(max_position_embeddings=64, rope_scaling={**settings, "factor": 1}) is not None


def test_fields_that_the_family_does_not_read():
    """One warning lists them; null is ignored; the version that wrote the file is named if it is newer."""
    with pytest.warns(UserWarning, match=r"^beta, qk_clip: not read by llama models in .*, and ignored$") as caught:
        assert config_of(qk_clip=3.0, beta=[1], gamma=None, transformers_version="4.40.0") == config_of()
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"^norm_topk: not .*"):  # no field of this family has this name
        config_of(norm_topk=True)
    with pytest.warns(UserWarning, match=r"^rope_thetta \(was rope_theta instead of rope_thetta meant\?\): not read"):
        config_of(rope_thetta=5e5)
    with pytest.warns(UserWarning, match=r"ignored; the file was written by transformers 6.1.0.dev0, which may read"):
        config_of(qk_clip=3.0, transformers_version="6.1.0.dev0")
    with pytest.warns(UserWarning, match=r"^rope_scaling.gamma: not read"):
        config_of(rope_scaling={"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "gamma": 1})
    with pytest.warns(UserWarning, match=r"^f00, .*, f19 and 80 more: not read"):
        config_of(**{f"f{index:02}": 1 for index in range(100)})
    with pytest.warns(UserWarning, match=r"^\\x1b\[2J: not read"):
        config_of(**{"\x1b[2J": 1})


def test_code_of_its_own():
    """Classes named like the family's own are accepted; with others, no field is ignored."""
    own = {"AutoConfig": "configuration_llama.LlamaConfig", "AutoModelForCausalLM": "org/name--x.LlamaForCausalLM"}
    assert config_of(auto_map=own) == config_of()
    with pytest.warns(UserWarning, match="^qk_clip: not read"):
        config_of(auto_map=own, qk_clip=3.0)
    other = {**own, "AutoModelForCausalLM": "modeling_other.OtherForCausalLM", "AutoTokenizer": ["a.B", None]}
    with pytest.warns(UserWarning, match=r"^auto_map names code that decodax does not run \(modeling_other.Other"):
        config_of(auto_map=other)
    with pytest.raises(ValueError, match=r"auto_map names code .*OtherForCausalLM\), so qk_clip may change the result"):
        config_of(auto_map=other, qk_clip=3.0)
    with pytest.raises(ValueError, match="auto_map must be an object or null, got 5"):
        config_of(auto_map=5)


def test_sizes_default_to_the_class():
    config = read_config({"model_type": "qwen2"})[1]
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (151936, 4096, 32)
    with pytest.raises(ValueError, match="num_experts_per_tok is missing: every deepseek_v2 config must give it"):
        read_config({"model_type": "deepseek_v2"})


def test_redundant_fields_pass():
    assert config_of("qwen2", attention_bias=True) == config_of("qwen2", qkv_bias=True) == config_of("qwen2")
    assert config_of("qwen3", rope_scaling={"rope_type": "default", "mrope_section": [1, 1, 2]}) == config_of("qwen3")
    off = {"use_sliding_window": False, "max_window_layers": 2}
    assert config_of(sliding_window=5, **off) == config_of(sliding_window=2048) == config_of()
    assert config_of(layer_types=["attention"] * 3) == config_of()  # an early name of full_attention


def test_window_stays_where_use_sliding_window_is_not_read():
    with pytest.warns(UserWarning, match="^use_sliding_window: not read by mistral models"):
        assert windows_of("mistral", sliding_window=9, use_sliding_window=False) == [9] * 3
    assert windows_of("mistral", sliding_window=None, use_sliding_window=False) == [None] * 3


def test_load_config_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_config(tmp_path)
    for content, expected in [("{", "no valid JSON"), ("[]", "must hold a JSON object"), ('{"a": 1}', "model_type")]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=expected) as caught:
            load_config(tmp_path)
        assert str(tmp_path / "config.json") in str(caught.value)
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=r"config.json is JSON nested deeper"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, "spice": 1}))
    with pytest.warns(UserWarning, match=r"config.json: spice: not read by llama models"):
        assert load_config(tmp_path)[0] is FAMILIES["llama"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"config.json is a link to"):
        load_config(tmp_path)
