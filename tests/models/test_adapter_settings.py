"""The settings of a LoRA adapter mean what the PEFT library says; what is not supported is refused by name."""

import json
import math

import pytest

import decodax
from decodax.models.checkpoints.adapters.settings import read_settings
from tests.golden_adapter_files import LLAMA, change, copy_adapter, refused


@pytest.fixture
def folder(tmp_path):
    return copy_adapter("second", tmp_path / "mine")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"peft_type": "IA3"}, r"peft_type must be \"LORA\", got 'IA3': merge the adapter with the PEFT library"),
        ({"peft_type": None}, r"peft_type must be \"LORA\", got None"),
        ({"use_dora": True}, "use_dora is not supported, got True: merge"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"megatron_config": {"a": 1}}, "megatron_config is not supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is not supported"),
        ({"corda_config": {"a": 1}}, "corda_config is not supported"),
        ({"eva_config": {"a": 1}}, "eva_config is not supported"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is not supported"),
        ({"use_qalora": True}, "use_qalora is not supported"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is not supported"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is not supported"),
        ({"from_the_\x1bfuture": 1}, r"from_the_\\x1bfuture is not supported, got 1"),
        ({"unknown": 0}, "unknown is not supported, got 0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be one of .* got 'pissa'"),
        ({"init_lora_weights": 1}, "init_lora_weights must be one of"),
        ({"bias": "some"}, "bias must be one of 'none', 'all', 'lora_only', got 'some'"),
        ({"use_rslora": 1}, "use_rslora must be one of False, True, got 1"),
        ({"r": 0}, r"r must be a whole number in 1\.\.65536, got 0"),
        ({"r": True}, "r must be a whole number"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern must be a whole number"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"(q": 2}}, r"rank_pattern has '\(q', which is no regular expression"),
        ({"alpha_pattern": {"(a*)*": 2}}, r"alpha_pattern has the pattern '\(a\*\)\*': at most"),
        ({"alpha_pattern": {"a" * 201: 2}}, "alpha_pattern has the pattern"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number, got '8'"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number, got nan"),
        ({"target_modules": [1]}, "target_modules must be a list of texts or null"),
        ({"target_parameters": ["mlp.experts.bias"]}, "target_parameters must end with one of weight, gate_up_proj, "),
        ({"target_parameters": 3}, "target_parameters must be a list of texts"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be a whole number, a list"),
        (
            {"r": 5},
            r"lora_A \[2, 30\] and lora_B \[\d+, 2\] of model.layers.\d.*, expected \[5, inputs\] and \[outputs, 5\]",
        ),
        ({"rank_pattern": {"1.mlp.gate_proj": 7}}, r"gate_proj, expected \[7, inputs\]"),
        ({"target_modules": ["q_proj"]}, r"matrices of model.layers.\d.mlp.gate_proj, which .*json does not name"),
        ({"exclude_modules": ["layers.1.mlp.gate_proj"]}, r"matrices of model.layers.1.mlp.gate_proj, which"),
        ({"layers_to_transform": 1}, r"matrices of model.layers.0\..*, which"),
    ],
)
def test_settings_that_are_refused(folder, fields, match):
    change(folder, **fields)
    refused(folder, match)


def test_neutral_fields_do_not_matter(folder):
    change(folder, some_new_field=None, other=False, more={}, last=[], fan_in_fan_out=True, lora_dropout=0.1)
    decodax.load(LLAMA, adapter=folder)


def test_scales_and_ranks(tmp_path):
    def settings(**fields):
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6} | fields))
        return read_settings(file)

    name = "model.layers.11.self_attn.q_proj"
    assert (settings().rank_of(name), settings().scale_of(name)) == (4, 1.5)
    assert settings(use_rslora=True).scale_of(name) == 3
    fitting = ("q_proj", name, ".*", r"layers\.1\d\.self_attn\.(q|k)_proj", "^model.layers.11.self_attn.q_proj")
    for pattern in (*fitting, "proj", "layers.1.self_attn.q_proj", "layers.11"):
        fits = pattern in fitting
        assert settings(rank_pattern={pattern: 3}).scale_of(name) == (2 if fits else 1.5), pattern
        assert settings(alpha_pattern={pattern: 2}).scale_of(name) == (0.5 if fits else 1.5), pattern
    assert settings(rank_pattern={"k_proj": 3, "q_proj": 2, ".*": 1}).rank_of(name) == 2
    for targets, changes in [(["q_proj"], True), (["self_attn.q_proj"], True), (["proj"], False), ([name], True),
                             ("anything", True), ("all-linear", True), ([], False)]:  # fmt: skip
        assert settings(target_modules=targets).changes(name) == changes, targets
    assert not settings(target_modules=["q_proj"], exclude_modules=["q_proj"]).changes(name)
    assert not settings(target_modules=["q_proj"], modules_to_save=["self_attn"]).changes(name)
    assert settings(target_modules=["q_proj"], layers_to_transform=[3, 11]).changes(name)
    assert not settings(target_modules=["q_proj"], layers_to_transform=1).changes(name)
    assert settings(target_modules=["q_proj"], layers_to_transform=11, layers_pattern="layers").changes(name)
    assert not settings(target_modules=["q_proj"], layers_to_transform=11, layers_pattern=["h", "blocks"]).changes(name)
    experts = "model.layers.7.mlp.experts.11.w1"
    assert settings(target_modules=["w1"], layers_to_transform=7).changes(experts)
