"""Tokenizers encode and decode: special tokens as in the files, bytes as characters, errors for damaged files."""

import json
import os

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from decodax.models.tokenizers.tokenizer import Tokenizer
from decodax.models.tokenizers.vocabulary_files import no_tokenizer_message
from tests.small_tokenizers import KINDS, whole_words


def byte_level(bos=False):
    """One token per byte, as GPT-2 writes bytes; <s> and </s> come after them."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return backend


def saved(folder, backend, **settings):
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_folder(folder)


def test_no_tokenizer_is_none_and_a_damaged_one_an_error(tmp_path):
    assert Tokenizer.from_folder(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer that the tokenizers library reads"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("bos", "settings", "expected"),
    [
        (False, {}, [64]),
        (True, {}, [256, 64]),
        (True, {"add_bos_token": True, "bos_token": "<s>"}, [256, 64]),
        (False, {"add_bos_token": True, "bos_token": "<s>"}, [256, 64]),
        (False, {"add_bos_token": True, "bos_token": {"content": "<s>", "special": True}}, [256, 64]),
        (False, {"add_bos_token": False, "bos_token": "<s>"}, [64]),
        (False, {"add_bos_token": True, "bos_token": None}, [64]),
        (False, {"add_eos_token": True, "eos_token": "</s>"}, [64, 257]),
        (True, {"add_eos_token": True, "eos_token": "</s>"}, [256, 64]),  # a post-processor decides alone
    ],
)
def test_special_tokens_around_a_text(tmp_path, bos, settings, expected):
    tokenizer = saved(tmp_path, byte_level(bos), **settings)
    assert tokenizer.encode("a") == expected
    assert tokenizer.encode("a", add_special_tokens=False) == [64]
    assert tokenizer.vocab_size == 258


def test_special_tokens_are_skipped_or_not(tmp_path):
    tokenizer = saved(tmp_path, byte_level())
    assert tokenizer.decode([256, 64, 65, 257]) == "ab"
    assert tokenizer.decode([256, 64, 65, 257], skip_special_tokens=False) == "<s>ab</s>"


def test_saved_truncation_and_padding_are_not_used(tmp_path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert saved(tmp_path, backend).encode("aaaa") == [64] * 4


def described(**changes):
    """The content of a tokenizer.json with words w0 to w29 (ids 4 to 33) and the special tokens before them."""
    return json.loads(whole_words().to_str()) | changes


def added(token_id, content, **flags):
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **usual, **flags}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_the_library(kind):
    """Where bytes are characters, only an invalid byte is decoded differently."""
    backend = KINDS[kind]()
    tokenizer = Tokenizer(backend)
    for text in ("a word ing a", "w1 w2 w7", "안녕하세요 words!", "नमस्ते 👩‍👩‍👧 é\n\n", "</s> a <s>ing"):
        ids = backend.encode(text).ids
        assert tokenizer.encode(text) == ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == backend.decode(ids, skip_special_tokens=skip)


def test_special_tokens_saved_as_normalized_are_left_out(tmp_path):
    """As in many early fine-tunes of Llama; tokenizers 0.23 shows them. Encoding stays as it is."""
    content = json.loads(KINDS["byte_fallback"]().to_str())
    content["added_tokens"] = [
        added(index, text, normalized=True) for index, text in enumerate(["<unk>", "<s>", "</s>"])
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    word = tokenizer.backend.token_to_id("▁word")
    assert tokenizer.decode([1, word, 2]) == "word"
    assert tokenizer.decode([1, word, 2], skip_special_tokens=False) == "<s> word</s>"
    stream = tokenizer.stream()
    assert stream.push([word]) + stream.push([2, word]) + stream.flush() == "word word"
    for text in ("word</s>", "</s>", "<s> word </s> a"):
        assert tokenizer.encode(text) == Backend.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids


def test_ids_without_a_token_are_left_out():
    tokenizer = Tokenizer(whole_words())
    assert tokenizer.decode([-1, 5, 99, 2**32, 2**70, 6]) == "w1 w2"


def test_text_must_be_unicode_that_the_vocabulary_has():
    tokenizer = Tokenizer(Backend(models.WordLevel({"a": 0})), source="its file")
    with pytest.raises(ValueError, match=r"its file cannot encode the text: .*UNK"):
        tokenizer.encode("b")
    with pytest.raises(ValueError, match=r"text must be Unicode, but its character 1 is half of one .*\\udc80"):
        tokenizer.encode("a\udc80")


def test_a_decoder_that_panics_is_an_error_when_it_decodes(tmp_path):
    """A panic of the library is no Exception, and would pass through every `except Exception`."""
    content = json.loads(byte_level().to_str())
    content["decoder"] = {"type": "Strip", "content": "a", "start": 0, "stop": 5}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot decode tokens: index out of bounds"):
        tokenizer.decode(tokenizer.encode("a"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no valid JSON"),
        ('{"model": 3', "no valid JSON"),
        ("[1]", "must hold a JSON object, got a list"),
        ("[" * 10**5, "nested deeper"),
        (described(normalizer={"a": json.loads("[" * 99 + "]" * 99)}), "nested deeper than 64"),
        (described(model=3), "is no tokenizer that the tokenizers library reads"),
        (described(added_tokens=None), "is no tokenizer that the tokenizers library reads"),
        (described(added_tokens=[added(2**40, "x")]), "is no tokenizer that the tokenizers library reads"),
        (described(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "tokenizers library reads"),
        (described(added_tokens=[added(2**32 - 1, "x")]), "added token 'x' the id 4294967295, but .* it is 34"),
        (described(added_tokens=[added(34, "x"), added(34, "y")]), "added token 'y' the id 34, .* it is 35, and 34 is"),
        (described(added_tokens=[added(5, "w0")]), "added token 'w0' the id 5, .* it is 4, and 5 is 'w1'"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_dangling_link_is_an_error(tmp_path):
    os.symlink("../../blobs/0", tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"is a link to .*, which is not there"):
        Tokenizer.from_folder(tmp_path)


def test_an_unsupported_tokenizer_file_is_named_with_what_to_do(tmp_path):
    assert no_tokenizer_message(tmp_path, "pass ids") == f"{tmp_path} has no tokenizer.json: pass ids"
    for name in ("spiece.model", "sentencepiece.bpe.model", "vocab.txt"):
        (tmp_path / name).write_text("")
        message = no_tokenizer_message(tmp_path, "pass ids")
        assert f"no tokenizer.json, only {name}, which" in message and message.endswith(", or pass ids")
        assert f"AutoTokenizer.from_pretrained({str(tmp_path)!r}).save_pretrained(" in message
        (tmp_path / name).unlink()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("")
    assert "only vocab.json and merges.txt, which" in no_tokenizer_message(tmp_path, "pass ids")
