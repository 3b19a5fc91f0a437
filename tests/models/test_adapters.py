"""A LoRA adapter that cannot be merged is refused in one line that says why; the settings mean what PEFT says."""

import json
import math
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import decodax
from decodax.decoding.auxiliary_weights import AuxiliaryWeights
from decodax.models.checkpoints.adapters.files import open_adapter
from decodax.models.checkpoints.adapters.merged_tensor import MergedTensor
from decodax.models.checkpoints.adapters.settings import read_settings
from decodax.models.checkpoints.conversion import open_source
from decodax.models.checkpoints.write_orbax import from_hf
from tests.golden_files import load_golden

GOLDEN = Path(__file__).parent.parent / "golden_adapters"
LLAMA = load_golden("llama").folder
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN / "second", tmp_path / "mine"))


def change(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def replace_tensors(folder, **tensors):
    """Replaces tensors of the first layer's q_proj, by the end of their names; None removes one."""
    file = folder / "adapter_model.safetensors"
    stored = load_file(file) | {f"{QUERY}.{name.replace('__', '.')}": value for name, value in tensors.items()}
    save_file({name: value for name, value in stored.items() if value is not None}, file)


def refused(folder, match, error=ValueError, model=LLAMA):
    with pytest.raises(error, match=match) as caught:
        decodax.load(model, adapter=folder)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"lora_A__weight": None}, "has lora_B of model.layers.0.self_attn.q_proj, expected lora_A and lora_B"),
        ({"lora_A__default__weight": np.ones((2, 30), np.float32)}, r"lora_A\.\S*weight in .* is there twice"),
        ({"lora_magnitude_vector": np.ones(48, np.float32)}, "q_proj.lora_magnitude_vector in .* is not understood"),
        ({"lora_A__weight": np.full((2, 30), np.nan, np.float32)}, "lora_A.weight in .* holds NaN or infinity"),
        ({"lora_B__weight": np.full((48, 2), np.inf, np.float32)}, "lora_B.weight in .* holds NaN or infinity"),
        ({"lora_A__weight": np.ones((2, 30), np.int32)}, r"must hold floating-point numbers \(.*\), got I32"),
        ({"lora_A__weight": np.ones((2, 3, 10), np.float32)}, r"lora_A \[2, 3, 10\] and lora_B \[48, 2\]"),
        (
            {"lora_A__weight": np.ones((2, 31), np.float32)},
            r"mine has matrices for model.layers.0.self_attn.q_proj.weight \[48, 31\], and the model's "
            r"model.layers.0.self_attn.q_proj.weight is \[48, 30\]: was it trained for another model "
            r"\(adapter_config.json names org/llama\)\?",
        ),
        ({"weight": np.ones((47, 30), np.float32)}, r"q_proj.weight \[47, 30\], and the model's .* is \[48, 30\]: was"),
    ],
)
def test_tensors_that_are_refused(folder, tensors, match):
    replace_tensors(folder, **tensors)
    refused(folder, match)


def test_an_adapter_of_another_model(folder):
    change(folder, base_model_name_or_path="org/\x1bother")
    refused(
        folder,
        r"changes model.layers.0.mlp.gate_proj.weight \[\d+, 30\], which the model does not have: was it trained for "
        r"another model \(adapter_config.json names org/\\x1bother\)\?",
        model=load_golden("phi3").folder,
    )
    refused(folder, r"matrices for model.layers.*\[\d+, \d+\], and the model's", model=load_golden("llama_tied").folder)
    refused(folder, "which the model does not have: was it trained", model=load_golden("gpt2").folder)


def test_experts_that_do_not_fit(tmp_path):
    """Of stacked experts, and of those that the model has in one tensor each."""
    for case, name in (("stacked_experts", "mixtral"), ("separate_experts", "qwen3_moe")):
        folder = Path(shutil.copytree(GOLDEN / case, tmp_path / case))
        file = folder / "adapter_model.safetensors"
        experts = "base_model.model.model.layers.1.mlp.experts"
        stored = load_file(file)
        rank = 2  # of down_proj
        fewer = {f"{experts}.lora_A.weight": stored[f"{experts}.lora_A.weight"][:-rank].copy()}
        fewer[f"{experts}.lora_B.weight"] = stored[f"{experts}.lora_B.weight"][:, :-rank].copy()
        save_file(stored | fewer, file)
        count = len(stored[f"{experts}.lora_A.weight"]) // rank
        match = rf"\[{count - 1}, .*, and the model's .* is \[{count}, |for {count - 1} experts of .* the model has {count}: was"
        refused(folder, match, model=load_golden(name).folder)
        save_file(stored | {f"{experts}.lora_A.weight": fewer[f"{experts}.lora_A.weight"][:-1].copy()}, file)
        refused(folder, r"of model.layers.1.mlp.experts, expected \[2, inputs\]", model=load_golden(name).folder)
        save_file(stored | {f"{experts}.base_layer.base_layer.lora_A.weight": fewer[f"{experts}.lora_A.weight"]}, file)
        refused(
            folder, "has lora_A of model.layers.1.mlp.experts.base_layer.base_layer", model=load_golden(name).folder
        )


def test_missing_files(folder, tmp_path):
    (folder / "adapter_model.safetensors").rename(tmp_path / "weights")
    refused(folder, "mine has neither adapter_model.safetensors nor adapter_model.bin", FileNotFoundError)
    (tmp_path / "weights").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").unlink()
    refused(folder, "mine has no adapter_config.json", FileNotFoundError)
    (folder / "adapter_config.json").write_text("[]")
    refused(folder, "adapter_config.json must hold a JSON object, got a list")
    refused(tmp_path / "nowhere", "nowhere", FileNotFoundError)


def test_modules_without_matrices_are_named(folder):
    change(folder, target_modules=["q_proj", "gate_proj", "up_proj"])
    words = r"names modules for which the adapter has no matrices.*: model.layers.0.mlp.up_proj.weight, model.layers.1"
    with pytest.warns(UserWarning, match=words):
        decodax.load(LLAMA, adapter=folder)


def test_an_orbax_base_is_refused(folder, tmp_path):
    from_hf(LLAMA, tmp_path / "orbax")
    refused(folder, "is an Orbax checkpoint, .* `decodax convert --adapter`", model=tmp_path / "orbax")


def test_the_names_of_a_wrapper(folder, tmp_path):
    """An adapter of a model inside another, as of the text model of one that sees images, and the other way round."""
    stored = load_file(folder / "adapter_model.safetensors")
    wrapped = {name.replace("model.model.model", "model.model.language_model"): value for name, value in stored.items()}
    save_file(wrapped, folder / "adapter_model.safetensors")
    found, plain = (
        decodax.load(LLAMA, adapter=place).params["blocks_1"]["mixer"]["query"] for place in (folder, GOLDEN / "second")
    )
    np.testing.assert_array_equal(found, plain)
    model = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    save_file({f"language_model.{name}": value for name, value in tensors.items()}, model / "model.safetensors")
    with pytest.warns(UserWarning, match="names of something that wraps the model"):
        found = decodax.load(model, adapter=GOLDEN / "second").params["blocks_1"]["mixer"]["query"]
    np.testing.assert_array_equal(found, plain)


def test_it_may_be_beside_its_model_or_inside(folder, tmp_path):
    plain = decodax.load(LLAMA, adapter=folder).params["blocks_1"]["mixer"]["query"]
    model = Path(shutil.copytree(LLAMA, tmp_path / "model"))
    shutil.copytree(folder, model / "inside")
    for name in folder.iterdir():
        shutil.copy(name, model)
    for adapter in (model, "inside"):
        if adapter == "inside":
            with pytest.warns(UserWarning, match="is not applied"):
                lm = decodax.load(model, adapter=adapter)
        else:
            lm = decodax.load(model, adapter=adapter)
        np.testing.assert_array_equal(lm.params["blocks_1"]["mixer"]["query"], plain)


def test_only_the_last_may_be_an_auxiliary_weights(folder):
    own = AuxiliaryWeights("layer_skip", {}, {})
    with pytest.raises(ValueError, match=r"adapter must be LoRA adapters .* of which only the last"):
        decodax.load(LLAMA, adapter=[own, folder])
    with pytest.raises(ValueError, match="of which only the last"):
        decodax.load(LLAMA, adapter=[own, own])


def test_a_loaded_model_is_not_converted_with_adapters(folder):
    with pytest.raises(ValueError, match="pass its folder, not the model"):
        open_source(decodax.load(LLAMA), [folder])


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


class Plain:
    """A stored tensor in memory."""

    kind, label, mappings = "BF16", "plain", ()

    def __init__(self, numbers):
        self.numbers, self.shape, self.dtype = numbers, numbers.shape, numbers.dtype

    def rows(self, index):
        return self.numbers[index]


def test_a_row_has_the_same_bits_whatever_is_read_with_it():
    rng = np.random.default_rng(7)
    base = rng.standard_normal((211, 83)).astype(ml_dtypes.bfloat16)
    left, right = rng.standard_normal((211, 37)).astype(np.float32), rng.standard_normal((37, 83)).astype(np.float16)
    tensor = MergedTensor(Plain(base), left[None], right[None], 0.7, "merged", ())
    full = tensor.rows(slice(None))
    assert full.dtype == np.float32 and tensor.dtype == base.dtype
    wanted = base.astype(np.float64) + np.float64(np.float32(0.7)) * left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(full, wanted, rtol=1e-5, atol=37 * 2**-22)
    for index in (slice(3, 4), slice(60, 131), np.array([0, 63, 64, 65, 200]), np.arange(1, 211, 7), slice(2, 211, 13)):
        np.testing.assert_array_equal(tensor.rows(index), full[index])
    assert base.dtype == ml_dtypes.bfloat16 and not np.shares_memory(full, base)
    wide = MergedTensor(Plain(base.astype(np.float64)), left[None], right[None], 0.7, "merged", ())
    assert wide.rows(slice(5, 9)).dtype == np.float64


def test_rows_of_a_stack():
    rng = np.random.default_rng(11)
    base = rng.standard_normal((3, 67, 13)).astype(np.float32)
    left, right = rng.standard_normal((3, 67, 5)).astype(np.float32), rng.standard_normal((3, 5, 13)).astype(np.float32)
    stack = Plain(base.reshape(-1, 13))
    stack.shape = base.shape
    tensor = MergedTensor(stack, left, right, -2.5, "merged", ())
    wanted = (base - 2.5 * np.einsum("eor,eri->eoi", left.astype(np.float64), right)).reshape(-1, 13)
    for index in (slice(None), slice(60, 140), np.array([0, 66, 67, 131, 133, 134, 200])):
        np.testing.assert_allclose(tensor.rows(index), wanted[index], rtol=2**-20, atol=2**-20)


def test_a_damaged_pickle_is_refused(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    refused(folder, "adapter_model.bin cannot be read as PyTorch weights: it is no zip archive")


def test_the_adapter_is_open_without_being_read(folder):
    adapter = open_adapter(folder)
    assert len(adapter.low_rank) == 4 and not adapter.whole
    assert re.fullmatch(r"was it trained for another model \(adapter_config.json names org/llama\)\?", adapter.origin)
