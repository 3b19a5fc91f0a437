"""The error for weights that do not fit one field of the config names the field, and not each of the tensors."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decodax.models.checkpoints.reading import load_params
from decodax.models.configs.hf_config import load_config
from tests.golden_files import load_golden


def lines_of(folder, golden, fields, tensors=None):
    """The lines of the error for a golden case with other fields in its config, or other tensors."""
    source = load_golden(golden).folder
    config = json.loads((source / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(config))
    stored = load_file(source / "model.safetensors")
    save_file(stored if tensors is None else tensors(stored), folder / "model.safetensors")
    family, read = load_config(folder)
    with pytest.raises(ValueError, match=r"do not fit its config\.json") as caught:
        load_params(folder, family, read, dtype=np.dtype(np.float32))
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


def wrong(name, said, found):
    return f"wrong field: {name} is {said} in config.json, the files have {found}"


@pytest.mark.parametrize(
    ("golden", "fields"),
    [
        ("llama", {"hidden_size": 60}),
        ("llama", {"intermediate_size": 43}),
        ("llama", {"vocab_size": 68}),
        ("llama", {"num_hidden_layers": 3}),
        ("llama", {"num_hidden_layers": 1}),
        ("qwen3_moe", {"moe_intermediate_size": 97}),
        pytest.param("deepseek_v3", {"kv_lora_rank": 34}, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", {"qk_rope_head_dim": 10}, marks=pytest.mark.slow),
    ],
)
def test_one_field(tmp_path, golden, fields):
    config = json.loads((load_golden(golden).folder / "config.json").read_text())
    lines = lines_of(tmp_path, golden, fields)
    assert lines == [wrong(name, value, config[name]) for name, value in fields.items()]


def test_several_fields_that_explain_a_mismatch_have_a_line_each(tmp_path):
    lines = lines_of(tmp_path, "llama", {"num_attention_heads": 12})
    config = json.loads((load_golden("llama").folder / "config.json").read_text())
    assert wrong("num_attention_heads", 12, config["num_attention_heads"]) in lines
    assert all(line.startswith("wrong field: ") for line in lines)


def test_a_missing_field_has_its_default(tmp_path):
    assert lines_of(tmp_path, "llama", {"intermediate_size": "left out"}) == [
        "wrong field: intermediate_size is missing in config.json, the files have 41"
    ]


@pytest.mark.parametrize(
    ("golden", "field", "said", "found"),
    [
        ("llama_biases", "attention_bias", "false", "true"),
        ("llama_tied", "tie_word_embeddings", "false", "true"),
        ("qwen2_moe_mixed", "mlp_only_layers", "[0]", "[0, 2, 3]"),
        ("qwen2_moe_mixed", "decoder_sparse_step", "1000", "2"),
        ("deepseek_v2", "n_shared_experts", "0", "2"),
        ("deepseek_v2", "first_k_dense_replace", "0", "1"),
        ("deepseek_v2", "q_lora_rank", "null", "14"),
    ],
)
def test_a_field_that_decides_which_tensors_exist(tmp_path, golden, field, said, found):
    """It is named first, then the missing and surplus tensors, since those may be lost instead."""
    first, *others = lines_of(tmp_path, golden, {field: json.loads(said)})
    assert first == f"wrong field: {field} is {said} in config.json, the files have {found}"
    assert all(line.startswith(("missing: ", "surplus: ", "and ")) for line in others) and others


def test_two_fields_that_are_wrong_together(tmp_path):
    config = json.loads((load_golden("llama").folder / "config.json").read_text())
    lines = lines_of(tmp_path, "llama", {"vocab_size": 71, "intermediate_size": 43})
    assert sorted(lines) == [
        wrong("intermediate_size", 43, config["intermediate_size"]),
        wrong("vocab_size", 71, config["vocab_size"]),
    ]


def test_mismatches_that_no_field_explains_are_listed(tmp_path):
    def damaged(tensors):
        return tensors | {"model.norm.weight": np.ones(7, np.float32), "odd": np.ones(2, np.float32)}

    lines = lines_of(tmp_path, "llama", {"vocab_size": 71}, damaged)
    assert lines == [
        wrong("vocab_size", 71, 67),
        "misshapen: model.norm.weight [7], expected [30]",
        "surplus: odd [2]",
    ]


def test_names_that_count_a_billion_layers_take_no_time(tmp_path):
    def damaged(tensors):
        return tensors | {"model.layers.999999999.mlp.up_proj.weight": np.ones((999_999, 1), np.int8)}

    assert lines_of(tmp_path, "llama", {}, damaged) == [
        "surplus: model.layers.999999999.mlp.up_proj.weight [999999, 1]"
    ]


def test_without_a_config_in_the_folder_the_tensors_are_listed(tmp_path):
    """As when a program passes its own config."""
    source = load_golden("llama").folder
    family, config = load_config(source)
    save_file(load_file(source / "model.safetensors") | {"odd": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit its config\.json:\n  - surplus: odd \[2\]$"):
        load_params(tmp_path, family, config, dtype=np.dtype(np.float32))
