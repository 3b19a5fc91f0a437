"""Models in GGUF have the configs and weights of the Hugging Face folders that they were made from."""

import hashlib
import json
import shutil
import warnings
from math import prod

import jax
import numpy as np
import pytest

import decodax
from decodax.models.checkpoints.model_source import source_of
from decodax.models.checkpoints.reading import load_params
from decodax.models.configs.hf_config import load_config, read_config
from decodax.models.load import find_folder
from tests.gguf_files import (
    GOLDEN_GGUF,
    NAMES,
    QUANTISED,
    float32_tensors,
    gguf_bytes,
    metadata_of,
    raw_config,
    tensors_of,
    write_case,
    write_gguf,
)
from tests.golden_files import load_golden, logits_of

EXACT = sorted(set(NAMES) - {"llama_llama3"})  # whose scaling is stored as its factors
FLOAT32 = np.dtype("float32")


def read_params(place):
    source = source_of(place)
    return load_params(source, *load_config(source), dtype=FLOAT32)


def same(one, other):
    """Whether two nested dictionaries hold the same arrays."""
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


@pytest.mark.parametrize("case", EXACT)
def test_a_golden_case_has_its_config_and_its_weights(case, tmp_path):
    path = write_case(tmp_path / "model.gguf", case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = read_config(raw_config(case))[1]
    assert load_config(path)[1] == expected
    params, golden = read_params(path), read_params(load_golden(case).folder)
    for (where, ours), (place, theirs) in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree_util.tree_leaves_with_path(golden), strict=True
    ):
        assert where == place
        shifted = case == "gemma2" and "norm" in str(where)  # (1 + w) - 1 in float32, of values below 4
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=2**-22 if shifted else 0)


def test_latent_attention_is_read_in_its_former_form_too(tmp_path):
    tensors = float32_tensors(tensors_of("deepseek_v2", absorbed=False))
    path = write_gguf(tmp_path / "model.gguf", metadata_of("deepseek_v2", absorbed=False), tensors)
    assert load_config(path)[1] == read_config(raw_config("deepseek_v2"))[1]
    assert same(read_params(path), read_params(load_golden("deepseek_v2").folder))


def test_scaling_that_is_stored_as_factors_gives_the_logits_of_transformers(tmp_path):
    golden, scaling = load_golden("llama_llama3"), raw_config("llama_llama3")["rope_scaling"]
    waves = scaling["original_max_position_embeddings"] * 100.0 ** -(np.arange(4) / 4) / (2 * np.pi)
    smooth = np.clip((waves - 1) / (4 - 1), 0, 1)
    factors = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    assert len(set(np.round(factors, 3))) == 3
    tensors = tensors_of("llama_llama3") | {"rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "model.gguf", metadata_of("llama_llama3"), float32_tensors(tensors))
    lm = decodax.load(path, dtype="float32")
    logits = logits_of(golden, lm, lm.params)
    for row, length in enumerate(golden.length):
        np.testing.assert_allclose(logits[row, :length], golden.logits[row, :length], rtol=0, atol=2e-4)


def test_quantised_weights_are_those_that_transformers_reads():
    expected = json.loads((GOLDEN_GGUF / "quantised.json").read_text())
    found = {}
    for name, tensor in source_of(QUANTISED).tensors().items():
        rows = np.concatenate([tensor.rows(slice(start, start + 7)) for start in range(0, prod(tensor.shape[:-1]), 7)])
        numbers = np.ascontiguousarray(rows.reshape(tensor.shape), np.float32)
        found[name] = [list(tensor.shape), hashlib.sha256(numbers.tobytes()).hexdigest()]
    assert found == expected


@pytest.fixture(scope="module")
def quantised():
    return decodax.load(QUANTISED, dtype="float32")


def test_a_file_has_its_tokenizer_its_end_tokens_and_its_template(quantised):
    assert quantised.tokenizer.encode("the<|im_end|>") == [1, quantised.tokenizer.backend.token_to_id("t"), 260, 2]
    assert quantised.tokenizer.decode([1, 262, 259, 2]) == " the a"
    assert quantised.end_token_ids == (2, 0)
    assert source_of(QUANTISED).read("chat_template.jinja").startswith(b"{% for message in messages %}")
    assert quantised.path == QUANTISED and quantised.config.tie_embeddings


def test_a_folder_with_one_file_is_that_model(quantised, tmp_path):
    shutil.copy(QUANTISED, tmp_path / "any.gguf")
    lm = decodax.load(str(tmp_path), dtype="float32")
    assert lm.path == tmp_path and same(lm.params, quantised.params)
    shutil.copy(QUANTISED, tmp_path / "other.gguf")
    with pytest.raises(ValueError, match=r"has 2 models in GGUF \(any.gguf, other.gguf\): pass the path of one"):
        decodax.load(tmp_path)


def test_safetensors_win_over_a_gguf_file_beside_them(tmp_path):
    shutil.copytree(load_golden("llama").folder, tmp_path / "model")
    (tmp_path / "model" / "x.gguf").write_bytes(b"no model")
    assert decodax.load(tmp_path / "model").config.vocab_size == 67


def test_generation_runs(quantised):
    result = decodax.generate(quantised, "the a", max_new_tokens=5)
    assert len(result.tokens[0]) <= 5


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4 a zip archive")
    with pytest.raises(ValueError, match=r"model.gguf is no GGUF file: it must start with GGUF, got b'PK"):
        decodax.load(tmp_path / "model.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.gguf is no GGUF file: it must start with GGUF, got b''"):
        decodax.load(tmp_path / "empty.gguf")
    (tmp_path / "renamed.bin").write_bytes(QUANTISED.read_bytes())
    assert find_folder(tmp_path / "renamed.bin") == tmp_path / "renamed.bin"


def parts(tmp_path, count=3, *, total=None, numbers=(0, 1, 2)):
    """A golden case split over files."""
    tensors = list(float32_tensors(tensors_of("llama")).items())
    paths = [tmp_path / f"m-{index + 1:05}-of-{count:05}.gguf" for index in range(count)]
    for index, path in enumerate(paths):
        split = {"split.no": numbers[index], "split.count": count, "split.tensors.count": total or len(tensors)}
        metadata = split if index else metadata_of("llama") | split
        path.write_bytes(gguf_bytes(metadata, dict(tensors[index::count])))
    return paths


def test_a_split_model_is_read_from_any_part_and_from_its_folder(tmp_path):
    paths = parts(tmp_path)
    expected = read_params(load_golden("llama").folder)
    for place in (*paths, tmp_path):
        assert same(read_params(place), expected)


def test_a_split_model_that_is_not_complete_is_refused(tmp_path):
    paths = parts(tmp_path)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"is one of 3 parts, and beside it m-00002-of-00003.gguf is missing"):
        decodax.load(paths[2])
    parts(tmp_path, total=99)
    with pytest.raises(ValueError, match=r"says that the model has 99 tensors, and its 3 file\(s\) hold 21"):
        decodax.load(paths[0])
    parts(tmp_path, numbers=(0, 2, 1))
    with pytest.raises(
        ValueError, match=r"m-00002-of-00003.gguf is part 2 of 3 by its key-values.* and part 1 of 3 by"
    ):
        decodax.load(paths[0])
    shutil.copy(paths[0], tmp_path / "alone.gguf")
    with pytest.raises(ValueError, match=r"alone.gguf is part 0 of 3 by its key-values.* and part 0 of 1 by its name"):
        decodax.load(tmp_path / "alone.gguf")
    parts(tmp_path)
    shutil.copy(paths[0], paths[1])
    with pytest.raises(ValueError, match="by its key-values"):
        decodax.load(paths[0])


def test_a_vocabulary_that_differs_from_the_embedding_is_refused(tmp_path):
    more = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{index}" for index in range(66)]}
    path = write_case(tmp_path / "model.gguf", "llama", **more)
    with pytest.raises(ValueError, match=r"tokens must have 67 tokens \(the rows of token_embd.weight\), got 66"):
        decodax.load(path)


def test_a_tensor_of_an_unknown_name_and_a_missing_one_are_reported(tmp_path):
    tensors = tensors_of("llama")
    tensors["blk.0.ffn_extra.weight"] = tensors.pop("blk.1.ffn_down.weight")
    path = write_gguf(tmp_path / "model.gguf", metadata_of("llama"), float32_tensors(tensors))
    with pytest.raises(
        ValueError, match=r"(?s)missing: model.layers.1.mlp.down_proj.weight.*surplus: blk.0.ffn_extra.weight"
    ):
        decodax.load(path)


@pytest.mark.parametrize("half", ["ffn_gate_exps", "ffn_up_exps"])
def test_half_of_a_pair_is_reported_by_its_own_name(half, tmp_path):
    """Both where the other half is missing and where it has another shape."""
    missing = {"ffn_gate_exps": "ffn_up_exps", "ffn_up_exps": "ffn_gate_exps"}[half]
    tensors = tensors_of("gpt_oss")
    other = tensors.pop(f"blk.0.{missing}.weight")
    for more in ({}, {f"blk.0.{missing}.weight": other[:, :-1]}):
        path = write_gguf(tmp_path / "model.gguf", metadata_of("gpt_oss"), float32_tensors(tensors | more))
        with pytest.raises(ValueError, match=rf"(?s)missing: model.layers.0.mlp.*surplus: blk.0.{half}.weight"):
            decodax.load(path)
