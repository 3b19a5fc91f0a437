"""`vocab.json` and `merges.txt` encode as transformers' GPT-2 tokenizer does; damaged ones are refused by line."""

import json

import pytest

from decodax.models.tokenizers.tokenizer import Tokenizer
from decodax.models.tokenizers.vocabulary_files import no_tokenizer_message
from tests.many_scripts import texts
from tests.models.test_gguf_vocabulary import BYTE_LEVEL
from tests.models.test_sentencepiece import checksums, expected

TOKENS = BYTE_LEVEL["tokens"]


def folder_of(folder, *, tokens=TOKENS, merges=BYTE_LEVEL["merges"], **settings):
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_thousand_texts_are_encoded_as_by_transformers(tmp_path):
    roles = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]}
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, tokenizer_class="GPT2Tokenizer", **roles))
    given = texts()
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in given]
    assert checksums(rows) == expected("pre/gpt-2")
    assert [tokenizer.decode(row, skip_special_tokens=False) for row in rows] == given


def test_a_start_token_where_the_settings_ask_for_one_as_opt_does(tmp_path):
    """facebook/opt-125m: bos_token is an object there, and add_bos_token is true."""
    bos = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": True, "rstrip": False}
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, bos_token=bos, add_bos_token=True))
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.encode("Hello") == [TOKENS.index("</s>"), *plain] and len(plain) > 0


def test_a_space_before_a_text_where_the_settings_ask_for_one(tmp_path):
    plain = Tokenizer.from_folder(folder_of(tmp_path)).encode(" Hello")
    assert Tokenizer.from_folder(folder_of(tmp_path, add_prefix_space=True)).encode("Hello") == plain


def test_the_end_of_text_is_special_without_settings(tmp_path):
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, tokens=[*TOKENS, "<|endoftext|>"]))
    assert tokenizer.encode("a<|endoftext|>b")[1] == len(TOKENS) and tokenizer.named_tokens["eos_token"]
    assert tokenizer.decode([len(TOKENS)]) == ""


def test_it_is_text_where_the_settings_name_another_end(tmp_path):
    folder = folder_of(tmp_path, tokens=[*TOKENS, "<|endoftext|>"], eos_token="</s>", tokenizer_class=None)
    (folder / "merges.txt").write_text((folder / "merges.txt").read_text("utf-8"), "utf-8-sig")
    assert len(Tokenizer.from_folder(folder).encode("<|endoftext|>")) > 5


def test_files_of_another_class_are_not_read(tmp_path):
    assert Tokenizer.from_folder(folder_of(tmp_path, tokenizer_class="RobertaTokenizer")) is None
    assert "vocab.json and merges.txt, which is not read" in no_tokenizer_message(tmp_path, "pass token ids")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"merges": ["à ¤", "nothing"]}, "merges.txt, line 3: two tokens of vocab.json that make a third"),
        ({"merges": ["à \x1b[2J"]}, r"line 2: .* got 'à \\x1b\[2J'"),
        ({"tokens": [*TOKENS, TOKENS[5]]}, "vocab.json must give every token an id, from 0"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(folder_of(tmp_path, **damage))


def test_merges_that_are_no_text_are_refused(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"merges.txt must be UTF-8"):
        Tokenizer.from_folder(tmp_path)
