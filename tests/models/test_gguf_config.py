"""Key-values of GGUF files become fields of a config.json; what is not understood is refused or reported."""

import numpy as np
import pytest

from decodax.models.checkpoints.gguf.architectures import ARCHITECTURES, DEEPSEEK_V3, MIXTRAL
from decodax.models.checkpoints.gguf.rope import rope_scaling
from decodax.models.configs.hf_config import load_config
from decodax.models.families import FAMILIES
from tests.gguf_files import GOLDEN_GGUF, float32_tensors, metadata_of, tensors_of, write_case, write_gguf


def config_of(tmp_path, case="llama", *, without=(), **more):
    more = {key.replace("__", "."): value for key, value in more.items()}
    metadata = {key: value for key, value in (metadata_of(case) | more).items() if key not in without}
    return load_config(write_gguf(tmp_path / "m.gguf", metadata, float32_tensors(tensors_of(case))))[1]


REFUSED = {
    "architecture": (
        {"general__architecture": "mamba"},
        "architecture must be one of llama, .*, gpt-oss .* got 'mamba'",
    ),
    "no architecture": ({"general__architecture": 3}, "general.architecture must be one of .*, got 3"),
    "layers": ({"llama__block_count": "two"}, "llama.block_count must be a whole number from 1 on, .* got 'two'"),
    "heads by layer": ({"llama__attention__head_count": [6, 3]}, r"head_count must be a whole number .*, got \[6, 3\]"),
    "no heads": ({"llama__attention__head_count": 0}, "llama.attention.head_count must be a whole number .*, got 0"),
    "norm": ({"llama__attention__layer_norm_rms_epsilon": "x"}, "epsilon must be a number above 0, got 'x'"),
    "heads that do not divide": ({"llama__attention__head_count_kv": 4}, "num_attention_heads must be a multiple of"),
    "values": (
        {"llama__attention__value_length": 6},
        r"value_length must be 8 \(the size of a head\) or absent",
    ),
    "part of a head": ({"llama__rope__dimension_count": 4}, r"dimension_count must be 8 \(the size of a head\)"),
    "vocabulary": ({"llama__vocab_size": 66}, r"llama.vocab_size must be 67 \(the rows of token_embd.weight\), got 66"),
    "window": ({"llama__attention__sliding_window": 7}, "llama.attention.sliding_window must be 0 or absent, got 7"),
    "causal": ({"llama__attention__causal": False}, "llama.attention.causal must be True or absent, got False"),
    "scale": ({"llama__logit_scale": 0.5}, "llama.logit_scale must be 0 or 1 or absent, got 0.5"),
    "other norm": (
        {"llama__attention__layer_norm_epsilon": 0.5},
        "layer_norm_epsilon must be absent for llama",
    ),
    "rope type": (
        {"llama__rope__scaling__type": "longrope"},
        "type must be none, linear or yarn, got longrope",
    ),
    "yarn factor": ({"llama__rope__scaling__attn_factor": 2.0}, "rope.scaling.attn_factor must be 1 or absent, got 2"),
    "two problems": (
        {"llama__block_count": 0, "llama__context_length": "x"},
        "key-values cannot be used: llama.block_count must be .*; llama.context_length must be",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_key_value_that_cannot_be_used_is_refused(case, tmp_path):
    more, match = REFUSED[case]
    with pytest.raises(ValueError, match=match) as caught:
        config_of(tmp_path, **more)
    assert str(caught.value).startswith(str(tmp_path / "m.gguf"))


def test_a_key_that_is_needed_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"llama.context_length must be a whole number .*, it is missing"):
        config_of(tmp_path, without=("llama.context_length",))


def test_keys_that_are_not_understood_are_reported_and_neutral_ones_are_not(tmp_path):
    with pytest.warns(UserWarning, match=r"m.gguf: 1 key-value\(s\) are not understood .* here: llama.extra$"):
        config_of(tmp_path, llama__extra=1, llama__logit_scale=1.0, llama__pooling_type=0, general__name="x")


def test_keys_that_may_be_missing_have_the_values_of_llama_cpp(tmp_path):
    given = config_of(tmp_path, llama__rope__freq_base=10000.0, llama__attention__head_count_kv=6)
    missing = config_of(tmp_path, without=("llama.rope.freq_base", "llama.attention.head_count_kv"))
    assert given == missing and given.blocks[0].mixer.layer.num_kv_heads == 6
    capped = config_of(tmp_path, "gemma2", without=("gemma2.final_logit_softcapping",))
    assert capped.head.softcap == 30.0


def test_a_number_for_every_layer_is_one_if_they_are_alike(tmp_path):
    assert config_of(tmp_path, llama__attention__head_count=[6, 6]) == config_of(tmp_path)


def test_a_missing_size_of_heads_follows_from_the_others(tmp_path):
    assert (
        config_of(tmp_path, "qwen2_moe", without=("qwen2moe.attention.key_length",)).blocks[0].mixer.layer.head_size
        == 6
    )
    with pytest.raises(ValueError, match="key_length must be given where embedding_length is no multiple of"):
        config_of(tmp_path, without=("llama.attention.key_length",), llama__attention__head_count=4)


def test_the_scores_of_the_largest_gemma2_are_scaled_by_its_width(tmp_path):
    usual = config_of(tmp_path, "gemma2")
    largest = config_of(tmp_path, "gemma2", gemma2__block_count=46)
    assert usual.blocks[0].mixer.layer.scale == 8**-0.5 and largest.blocks[0].mixer.layer.scale == (30 // 6) ** -0.5


def test_weights_of_experts_must_be_scaled_as_the_family_scales_them(tmp_path):
    config_of(tmp_path, "qwen3_moe", qwen3moe__expert_weights_norm=True)
    with pytest.raises(ValueError, match=r"qwen3moe.expert_weights_norm must be True or absent, got False"):
        config_of(tmp_path, "qwen3_moe", qwen3moe__expert_weights_norm=False)


def test_only_the_window_of_every_second_layer_is_gemma2(tmp_path):
    assert config_of(tmp_path, "gemma2", gemma2__attention__sliding_window_pattern=2) == config_of(tmp_path, "gemma2")
    with pytest.raises(ValueError, match=r"gemma2.attention.sliding_window_pattern must be 2 or absent, got 3"):
        config_of(tmp_path, "gemma2", gemma2__attention__sliding_window_pattern=3)


LATENT = {
    "no rotation": ({}, ("deepseek2.rope.dimension_count",), "rope.dimension_count must be a whole number .* missing"),
    "no keys": ({"attention.key_length_mla": 4}, (), r"key_length_mla must be above 4 \(rope.dimension_count\), got 4"),
    "other head": ({"attention.value_length": 9}, (), r"attention.value_length must be 10 \(the size of the latent"),
    "no scale": ({}, ("deepseek2.rope.scaling.yarn_log_multiplier",), "yarn_log_multiplier must be a number above 0"),
    "experts": ({"expert_weights_norm": True}, (), "expert_weights_norm must be False or absent, got True"),
    "layers for drafts": ({"nextn_predict_layers": 1}, (), "nextn_predict_layers must be 0 or absent, got 1"),
}


@pytest.mark.parametrize("case", LATENT)
def test_latent_attention_that_cannot_be_used_is_refused(case, tmp_path):
    more, without, match = LATENT[case]
    more = {f"deepseek2.{key}": value for key, value in more.items()}
    with pytest.raises(ValueError, match=match):
        config_of(tmp_path, "deepseek_v2", without=without, **more)


def test_experts_without_groups_are_chosen_from_all(tmp_path):
    groups = ("deepseek2.expert_group_count", "deepseek2.expert_group_used_count")
    with pytest.warns(UserWarning, match="it has no groups of experts"):
        router = config_of(tmp_path, "deepseek_v3", without=groups).blocks[1].feed_forward.layer.router
    assert router.num_groups is None and router.selection_bias and router.score == "sigmoid"
    grouped = config_of(tmp_path, "deepseek_v3").blocks[1].feed_forward.layer.router
    assert grouped.num_groups == 3 and grouped.scale == pytest.approx(1.7)


@pytest.mark.parametrize(
    "factors", [np.ones(3), np.array([1, 2, -4.0, 8]), np.array([1, 0.0, 4, 8]), np.array([1, 2, np.nan, 8])]
)
def test_factors_of_the_rotation_are_checked(factors, tmp_path):
    tensors = tensors_of("llama") | {"rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "m.gguf", metadata_of("llama"), float32_tensors(tensors))
    with pytest.raises(ValueError, match=r"rope_freqs.weight must (be F32 \[4\] \(half|hold positive numbers)"):
        load_config(path)


def test_factors_of_one_change_nothing(tmp_path):
    tensors = float32_tensors(tensors_of("llama") | {"rope_freqs.weight": np.ones(4)})
    path = write_gguf(tmp_path / "m.gguf", metadata_of("llama"), tensors)
    assert load_config(path)[1] == load_config(write_case(tmp_path / "n.gguf", "llama"))[1]


@pytest.mark.parametrize("name,factor", [("8B", 8.0), ("1B", 32.0)])
def test_the_factors_of_llama_3_are_recognised(name, factor):
    with np.load(GOLDEN_GGUF / "rope_factors.npz") as file:
        factors = file[name].astype(np.float64)

    def scaling(factors):
        return rope_scaling({}, factors, 500000.0, 131072, truncates=True, scales_scores=False, problems=[])

    assert scaling(factors) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    changed = np.where(np.arange(len(factors)) == len(factors) // 2 + 3, factors * 1.001, factors)
    assert scaling(changed)["rope_type"] == "longrope" and scaling(changed)["long_factor"] == changed.tolist()


def test_every_architecture_is_of_a_family():
    for architecture in (*ARCHITECTURES.values(), MIXTRAL, DEEPSEEK_V3):
        family = FAMILIES[architecture.model_type]
        fields = {*architecture.fields.values(), *architecture.constants, *architecture.bias_fields}
        assert fields <= family.defaults.keys() | family.aliases.keys() | family.fixed.keys()
