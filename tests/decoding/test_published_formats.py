"""Files as FasterDecoding/Medusa and hmarkc/parallel-prompt-decoding write them are loaded, or refused."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import decodax
from decodax.decoding.auxiliary_weights import read_auxiliary_weights, write_auxiliary_weights
from decodax.decoding.published_formats import PUBLISHED_ACCURACY, load_medusa, load_prompt_tokens
from decodax.models.medusa_heads import head_logits
from tests.decoding.test_generation import LM

WIDTH, VOCABULARY = LM.config.hidden_size, LM.config.vocab_size
HEADS, BLOCKS, DISTANCES, ENSEMBLE = 3, 2, 3, 2
RANDOM = np.random.default_rng(6)
PROMPT_CONFIG = {
    "peft_type": "PROMPT_TUNING",
    "base_model_name_or_path": "someone/tiny",
    "num_special_tokens": DISTANCES,
    "virtual_tokens_per_special_token": ENSEMBLE,
    "num_virtual_tokens": DISTANCES * ENSEMBLE,
    "token_dim": WIDTH,
    "vt_attention_type": "ensemble",
    "aggregation_type": "mean",
    "use_custom_lm_head": False,
    "use_prefix_tuning": False,
    "num_exits": 1,
}


def medusa_tensors(width=WIDTH, vocab_size=VOCABULARY):
    tensors = {}
    for head in range(HEADS):
        for block in range(BLOCKS):
            tensors[f"{head}.{block}.linear.weight"] = RANDOM.normal(size=(width, width)).astype(np.float32)
            tensors[f"{head}.{block}.linear.bias"] = RANDOM.normal(size=width).astype(np.float32)
        tensors[f"{head}.{BLOCKS}.weight"] = RANDOM.normal(size=(vocab_size, width)).astype(np.float32)
    return tensors


def folder_of(path, config, tensors, config_name, weights_name):
    path.mkdir(exist_ok=True)
    (path / config_name).write_text(json.dumps(config))
    save_file(tensors, path / weights_name)
    return path


def medusa_folder(path, tensors, **config):
    known = {"medusa_num_heads": HEADS, "medusa_num_layers": BLOCKS, "base_model_name_or_path": "someone/tiny"}
    return folder_of(path, known | config, tensors, "config.json", "medusa_lm_head.safetensors")


def prompt_folder(path, embedding=None, **config):
    shape = (DISTANCES * ENSEMBLE, WIDTH)
    tensors = {"prompt_embeddings": RANDOM.normal(size=shape).astype(np.float32) if embedding is None else embedding}
    return folder_of(path, PROMPT_CONFIG | config, tensors, "adapter_config.json", "adapter_model.safetensors")


def test_medusa_heads(tmp_path):
    """Every tensor is where the published model has it: x + SiLU(linear(x)) per block, then the output matrix."""
    tensors = medusa_tensors()
    loaded = load_medusa(medusa_folder(tmp_path / "heads", tensors), LM)
    assert loaded.kind == "medusa" and loaded.shape == {"heads": HEADS, "blocks": BLOCKS, "tied": False}
    assert loaded.facts["published_for"] == "someone/tiny" and loaded.name == "heads"
    state = RANDOM.normal(size=(2, WIDTH))
    found = head_logits(LM.model, LM.params, loaded.params["heads"], jnp.asarray(state[:, None], jnp.float32), HEADS)
    for head in range(HEADS):
        inside = state
        for block in range(BLOCKS):
            linear = inside @ tensors[f"{head}.{block}.linear.weight"].T + tensors[f"{head}.{block}.linear.bias"]
            inside = inside + linear / (1 + np.exp(-linear))
        want = inside @ tensors[f"{head}.{BLOCKS}.weight"].T
        np.testing.assert_allclose(found[:, head, 0], want, atol=2e-5 * np.abs(want).max())  # float32 sums of 23 terms


def test_all_heads_of_the_file_are_read(tmp_path):
    """The published Vicuna configs name two heads, their files hold five."""
    loaded = load_medusa(medusa_folder(tmp_path, medusa_tensors(), medusa_num_heads=2), LM)
    assert len(loaded.params["heads"]) == HEADS
    with pytest.raises(ValueError, match=r"names 4 heads in config\.json, and its weights hold 3"):
        load_medusa(medusa_folder(tmp_path, medusa_tensors(), medusa_num_heads=4), LM)


def test_published_heads_decode_and_are_written_again(tmp_path):
    loaded = load_medusa(medusa_folder(tmp_path / "published", medusa_tensors()), LM)
    found = decodax.generate(LM, "abc", max_new_tokens=12, strategy="medusa", draft=loaded, draft_tokens=5)
    np.testing.assert_array_equal(found.tokens, decodax.generate(LM, "abc", max_new_tokens=12).tokens)
    write_auxiliary_weights(tmp_path / "kept", loaded, "float32")
    again = read_auxiliary_weights(tmp_path / "kept", "float32")
    np.testing.assert_array_equal(again.params["heads"]["head_2"]["out"], loaded.params["heads"]["head_2"]["out"])
    assert again.rank_accuracy == loaded.rank_accuracy == [list(row) for row in PUBLISHED_ACCURACY]


def test_accuracies_may_be_given(tmp_path):
    folder = medusa_folder(tmp_path, medusa_tensors())
    given = [[0.5, 0.25], [0.25, 0.125], [0.125, 0.0625]]
    assert load_medusa(folder, LM, given).rank_accuracy == given
    with pytest.raises(ValueError, match="one row per distance, 3, got 2"):
        load_medusa(folder, LM, given[:2])


def test_prompt_tokens(tmp_path):
    """The members of an ensemble follow one another, distance by distance."""
    embedding = RANDOM.normal(size=(DISTANCES * ENSEMBLE, WIDTH)).astype(np.float32)
    loaded = load_prompt_tokens(prompt_folder(tmp_path, embedding), LM)
    assert loaded.kind == "ppd" and loaded.shape == {"distances": DISTANCES, "ensemble": ENSEMBLE}
    for distance in range(DISTANCES):
        for member in range(ENSEMBLE):
            want = embedding[ENSEMBLE * distance + member]
            np.testing.assert_array_equal(loaded.params["embedding"][distance, member], want)


def test_a_file_of_prompt_tokens_alone(tmp_path):
    embedding = RANDOM.normal(size=(4, WIDTH)).astype(np.float32)
    save_file({"prompt_embeddings": embedding}, tmp_path / "prompts.safetensors")
    loaded = load_prompt_tokens(tmp_path / "prompts.safetensors", LM)
    assert loaded.shape == {"distances": 4, "ensemble": 1}
    np.testing.assert_array_equal(loaded.params["embedding"][:, 0], embedding)
    assert loaded.rank_accuracy[3] == loaded.rank_accuracy[2] == list(PUBLISHED_ACCURACY[2])
    found = decodax.generate(LM, "abc", max_new_tokens=12, strategy="ppd", draft=loaded, draft_tokens=12)
    np.testing.assert_array_equal(found.tokens, decodax.generate(LM, "abc", max_new_tokens=12).tokens)


class Tensor:
    """The methods of PyTorch tensors that the loader uses."""

    def __init__(self, array):
        self.array = array

    def float(self):
        return Tensor(self.array.astype(np.float32))

    def numpy(self):
        return self.array


class Torch:
    """The functions of PyTorch that the loader uses; records their arguments."""

    def __init__(self, tensors):
        self.tensors, self.asked = tensors, []

    def load(self, file, **options):
        self.asked.append((file.name, options))
        if self.tensors is None:
            raise RuntimeError("Weights only load failed")
        return {name: Tensor(array.astype(np.float16)) for name, array in self.tensors.items()}


def test_pickled_files_are_opened_as_tensors_only(tmp_path, monkeypatch):
    folder, tensors = medusa_folder(tmp_path, medusa_tensors()), medusa_tensors()
    (folder / "medusa_lm_head.safetensors").rename(folder / "medusa_lm_head.pt")
    torch = Torch(tensors)
    monkeypatch.setitem(sys.modules, "torch", torch)
    loaded = load_medusa(folder, LM)
    assert torch.asked == [("medusa_lm_head.pt", {"map_location": "cpu", "weights_only": True})]
    want = tensors["1.0.linear.bias"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(loaded.params["heads"]["head_1"]["block_0"]["bias"], want)
    monkeypatch.setitem(sys.modules, "torch", Torch(None))
    with pytest.raises(ValueError, match="cannot be read as tensors alone: Weights only load failed"):
        load_medusa(folder, LM)
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(ImportError, match="only PyTorch may open: pip install torch, or convert it to safetensors"):
        load_medusa(folder, LM)


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_medusa(tmp_path / "nowhere", LM)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_medusa(tmp_path, LM)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds none of medusa_lm_head\.safetensors, medusa_lm_head\.pt"):
        load_medusa(tmp_path, LM)
    (tmp_path / "medusa_lm_head.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"medusa_lm_head\.safetensors is no intact safetensors file"):
        load_medusa(tmp_path, LM)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="is no valid JSON"):
        load_medusa(tmp_path, LM)

    lacking = medusa_tensors()
    lacking["extra"] = lacking.pop("1.0.linear.bias")
    flat = medusa_tensors() | {"0.0.linear.weight": np.zeros(WIDTH, np.float32)}
    for tensors, message in (
        (lacking, r"missing: 1.0.linear.bias; unknown: extra"),
        (flat, r"head_0.block_0.weight has the shape \(23,\)"),
        (medusa_tensors(width=19), r"weights \[23, 23\] .* got \[\(19, 19, 19\)\] in head_0"),
        (medusa_tensors(vocab_size=41), "vocabulary of 37 tokens, got 41 in head_0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_medusa(medusa_folder(tmp_path, tensors), LM)


@pytest.mark.parametrize(
    ("embedding", "config", "message"),
    [
        (np.zeros((6, 19), np.float32), {}, r"hidden size, \[rows, 23\], got \[6, 19\]"),
        (np.zeros(23, np.float32), {}, r"got \[23\]"),
        (np.zeros((5, 23), np.float32), {}, "names 3 distances of 2 embeddings, and holds 5"),
        (None, {"vt_attention_type": "decoder"}, "has vt_attention_type 'decoder'"),
        (None, {"aggregation_type": "weighted"}, "has aggregation_type 'weighted'"),
        (None, {"use_custom_lm_head": True}, "has use_custom_lm_head True"),
        (None, {"use_prefix_tuning": True}, "has use_prefix_tuning True"),
        (None, {"num_exits": 2}, "has num_exits 2"),
    ],
)
def test_prompt_tokens_that_do_not_fit(tmp_path, embedding, config, message):
    with pytest.raises(ValueError, match=message):
        load_prompt_tokens(prompt_folder(tmp_path, embedding, **config), LM)


def test_prompt_tokens_under_another_name(tmp_path):
    save_file({"soft_prompt": np.zeros((3, WIDTH), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        load_prompt_tokens(tmp_path, LM)
    with pytest.raises(ValueError, match=r"missing: prompt_embeddings; unknown: soft_prompt"):
        load_prompt_tokens(tmp_path / "adapter_model.safetensors", LM)
