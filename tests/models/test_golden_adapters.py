"""LoRA adapters merged as a model is read give what the PEFT library computes with the adapter beside the weights.

The folders in tests/golden_adapters are of scripts/make_golden_adapters.py.
"""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import decodax
from decodax.models.checkpoints.write_hf import to_hf
from decodax.models.checkpoints.write_orbax import from_hf
from tests.gguf_files import write_case
from tests.golden_files import load_golden

GOLDEN = Path(__file__).parent.parent / "golden_adapters"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())
# Merged weights: one rounding of a sum and the product's own, of at most 5 terms (the rank).
WEIGHTS = {"rtol": 2**-22, "atol": 2**-22}
LOGITS = {"rtol": 1e-4, "atol": 1e-4}  # float32, sums of at most 64 terms in two layers


def base_of(case):
    return load_golden(json.loads((GOLDEN / case / "base.json").read_text())).folder


def golden(case):
    with np.load(GOLDEN / case / "golden.npz") as file:
        stored = dict(file)
    return stored.pop("tokens"), stored.pop("logits"), stored


def tensors_in(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_adapted_model(case):
    tokens, expected, _ = golden(case)
    lm = decodax.load(base_of(case), dtype="float32", adapter=GOLDEN / case)
    assert lm.adapter is None
    np.testing.assert_allclose(decodax.logits(lm, tokens), expected, **LOGITS)
    plain = decodax.logits(decodax.load(base_of(case), dtype="float32"), tokens)
    assert np.abs(plain - expected).max() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_merge_and_unload(case, tmp_path):
    _, _, merged = golden(case)
    to_hf(base_of(case), tmp_path / "out", adapters=[GOLDEN / case])
    found = tensors_in(tmp_path / "out")
    if case == "tied_embedding":  # PEFT merges in place, into the head too, which is not what was trained
        before = tensors_in(base_of(case))["model.embed_tokens.weight"]
        np.testing.assert_array_equal(found["lm_head.weight"], before)
        del merged["lm_head.weight"]
    assert len(merged) >= 1
    for name, value in merged.items():
        full = found[name] if name in found else stack_of(found, name)
        np.testing.assert_allclose(full[..., -11:, :] if full.ndim > 1 else full, value, **WEIGHTS, err_msg=name)
    if "tied" in case:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def stack_of(found, name):
    """The experts' matrices as transformers computes with them, [E, 2F, D] or [E, D, F], from one file tensor each."""
    module, _, own = name.rpartition(".")
    files = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[own]
    if not any(tensor.startswith(module) for tensor in found):  # as in Mixtral's files
        module = module.replace("mlp", "block_sparse_moe")
        files = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[own]
    count = sum(re.fullmatch(rf"{re.escape(module)}\.\d+\.{files[0]}\.weight", tensor) is not None for tensor in found)
    assert count >= 5
    return np.stack([np.concatenate([found[f"{module}.{e}.{file}.weight"] for file in files]) for e in range(count)])


def change_of(case, module, scale):
    """The change of a module's weight in float64."""
    stored = load_file(GOLDEN / case / "adapter_model.safetensors")
    up, down = (stored[f"base_model.model.{module}.lora_{name}.weight"].astype(np.float64) for name in "BA")
    return scale * up @ down


def test_several_are_summed_in_order(tmp_path):
    first, second, saved = (GOLDEN / name for name in ("patterns", "second", "rank_stabilised"))
    to_hf(base_of("patterns"), tmp_path / "out", adapters=[first, second, first])
    found, before = tensors_in(tmp_path / "out"), tensors_in(base_of("patterns"))
    query, gate = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"
    wanted = before[f"{query}.weight"] + change_of("second", query, 1.5) + 2 * change_of("patterns", query, 7 / 5)
    np.testing.assert_allclose(found[f"{query}.weight"], wanted, rtol=2**-21, atol=2**-21)
    wanted = before[f"{gate}.weight"] + change_of("second", gate, 1.5)
    np.testing.assert_allclose(found[f"{gate}.weight"], wanted, **WEIGHTS)
    both = [decodax.load(base_of("patterns"), adapter=names).params for names in ([first, saved], [saved, first])]
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=2**-21, atol=2**-21), *both)
    one = decodax.load(base_of("patterns"), adapter=[]).params
    jax.tree.map(np.testing.assert_array_equal, one, decodax.load(base_of("patterns")).params)


def test_a_replaced_tensor_replaces_what_came_before(tmp_path):
    """Of the adapters [A, B], a whole tensor of B is the result; A's change of it counts after it."""
    folder = Path(shutil.copytree(GOLDEN / "second", tmp_path / "whole"))
    query = "model.layers.0.self_attn.q_proj"
    stored = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in stored.items() if f"{query}." not in name}
    whole = np.arange(48 * 30, dtype=np.float32).reshape(48, 30) / 64
    save_file(kept | {f"base_model.model.{query}.weight": whole}, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"modules_to_save": ["layers.0.self_attn.q_proj"]})
    )
    for number, order in enumerate([[GOLDEN / "patterns", folder], [folder, GOLDEN / "patterns"]]):
        to_hf(base_of("patterns"), tmp_path / str(number), adapters=order)
    np.testing.assert_array_equal(tensors_in(tmp_path / "0")[f"{query}.weight"], whole)
    wanted = whole + change_of("patterns", query, 7 / 5)
    np.testing.assert_allclose(tensors_in(tmp_path / "1")[f"{query}.weight"], wanted, rtol=2**-21, atol=2**-21)


@pytest.mark.parametrize(
    "case", ["patterns", "fused", "transposed", "tied_embedding", "stacked_experts", "separate_experts", "one_stack"]
)
def test_the_same_numbers_on_a_mesh_and_from_converted_files(case, tmp_path):
    base, adapter = base_of(case), GOLDEN / case
    expected = decodax.load(base, dtype="float32", adapter=adapter)
    mesh = "data=8" if case == "tied_embedding" else "tensor=2,data=4"  # the first has 5 heads
    split = decodax.load(base, dtype="float32", mesh=mesh, adapter=adapter)
    from_hf(base, tmp_path / "orbax", adapters=[adapter])
    to_hf(base, tmp_path / "hf", adapters=[adapter])
    others = (split.model.unstacked(split.params), *(decodax.load(tmp_path / name).params for name in ("orbax", "hf")))
    for params in others:
        jax.tree.map(np.testing.assert_array_equal, params, expected.params)


def test_bfloat16_is_rounded_once(tmp_path):
    """As PEFT does: the sum in float32, rounded to the weight's own dtype."""
    to_hf(base_of("second"), tmp_path / "base", dtype="bfloat16")
    to_hf(tmp_path / "base", tmp_path / "out", adapters=[GOLDEN / "second"])
    name = "model.layers.1.self_attn.q_proj"
    before = load_file(tmp_path / "base" / "model.safetensors")[f"{name}.weight"]
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert found.dtype == before.dtype == jnp.bfloat16
    wanted = before.astype(np.float64) + change_of("second", name, 1.5)
    np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(jnp.bfloat16).astype(np.float32))
    in_float32 = decodax.load(tmp_path / "base", dtype="float32", adapter=GOLDEN / "second").params
    np.testing.assert_allclose(in_float32["blocks_1"]["mixer"]["query"], wanted, **WEIGHTS)


@pytest.mark.parametrize("case", ["patterns", "tied_embedding", "stacked_experts", "separate_experts"])
def test_a_gguf_file_has_the_same_result(case, tmp_path):
    base = base_of(case)
    path = write_case(tmp_path / "model.gguf", base.name)
    found, expected = (decodax.load(place, dtype="float32", adapter=GOLDEN / case).params for place in (path, base))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_packed_weights(tmp_path):
    """The adapter is added to the dequantised numbers."""
    packed = Path(__file__).parent.parent / "golden_formats" / "gptq"
    rng = np.random.default_rng(3)
    up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((48, 5), (5, 32)))
    module = "model.layers.0.mlp.up_proj"
    folder = write_adapter(
        tmp_path / "adapter", {f"{module}.lora_A.default.weight": down, f"{module}.lora_B.default.weight": up}, r=5
    )
    before = decodax.load(packed).params["blocks_0"]
    after = decodax.load(packed, adapter=folder).params["blocks_0"]
    wanted = np.asarray(before["feed_forward"]["up"], np.float64) + 8 / 5 * up.astype(np.float64) @ down
    np.testing.assert_allclose(after["feed_forward"]["up"], wanted, rtol=2**-20, atol=2**-20)
    np.testing.assert_array_equal(after["feed_forward"]["gate"], before["feed_forward"]["gate"])


def write_adapter(folder, tensors, **fields):
    folder.mkdir()
    settings = {"peft_type": "LORA", "target_modules": ["up_proj"], "lora_alpha": 8} | fields
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder
