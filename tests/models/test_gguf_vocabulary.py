"""Tokenizers from a GGUF file's key-values encode as the models' own; unknown kinds and damaged values are refused."""

import json
import re

import numpy as np
import pytest

from decodax.models.tokenizers.gguf_pre_tokenizers import PRE_TOKENIZERS
from decodax.models.tokenizers.gguf_vocabulary import build_tokenizer, gguf_chat_templates, named_tokens
from decodax.models.tokenizers.sentencepiece_file import PieceKind, read_sentencepiece
from decodax.models.tokenizers.tokenizer import Tokenizer
from tests.many_scripts import texts
from tests.models.test_sentencepiece import EXPECTED, GOLDEN, checksums, expected

BYTE_LEVEL = json.loads((GOLDEN / "byte_level.json").read_text("utf-8"))
KEY = "tokenizer.ggml."


def byte_level(pre="gpt-2", **changes):
    """The key-values of the small byte-level vocabulary; None takes one out."""
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": BYTE_LEVEL["tokens"],
        "token_type": [3, 3, 3] + [1] * (len(BYTE_LEVEL["tokens"]) - 3),
        "merges": BYTE_LEVEL["merges"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | changes
    return {KEY + name: value for name, value in values.items() if value is not None}


def sentencepiece(name, **changes):
    """The key-values that a converter makes of a small vocabulary: user-defined pieces have spaces there."""
    pieces = read_sentencepiece(GOLDEN / f"{name}.model").pieces
    values = {
        "model": "llama",
        "tokens": [p.text.replace("▁", " ") if p.kind is PieceKind.USER_DEFINED else p.text for p in pieces],
        "scores": np.array([p.score for p in pieces], np.float32),
        "token_type": [int(p.kind) for p in pieces],
    } | changes
    return {KEY + name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize("pre", [name.removeprefix("pre/") for name in EXPECTED if name.startswith("pre/")])
def test_a_thousand_texts_are_encoded_as_by_transformers(pre):
    tokenizer = Tokenizer(build_tokenizer(byte_level(pre)))
    given = texts()
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in given]
    assert checksums(rows) == expected(f"pre/{pre}")
    if not PRE_TOKENIZERS[pre].nfc:
        assert [tokenizer.decode(row, skip_special_tokens=False) for row in rows] == given


@pytest.mark.parametrize(("name", "has_prefix"), [("bpe_bytes", None), ("bpe_own_pieces", False)])
def test_a_thousand_texts_are_encoded_as_by_sentencepiece(name, has_prefix):
    tokenizer = Tokenizer(build_tokenizer(sentencepiece(name, add_space_prefix=has_prefix)))
    given = texts(look_alikes=False)
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in given]
    assert checksums(rows) == expected(name)
    assert [tokenizer.decode(row) for row in rows] == given


# Cut by hand from the pre-tokenizers in the models' own tokenizer.json.
CUTS = {
    "smollm": ("a1234 b's ½x\n\n  c", ["a", "1", "2", "3", "4", " b", "'s", " ", "½", "x", "\n\n ", " c"]),
    "falcon": ("a1234567 b's`x`!?", ["a", "123", "456", "7", " b", "'", "s", "`", "x", "`!?"]),
    "default": ("a1234567 b's`x`!?", ["a", "123", "456", "7", " b", "'", "s", "`", "x", "`", "!?"]),
    "deepseek-llm": (
        "A 12 b!?\r\n 中文 かな ",
        ["A", " ", "12", " b", "!?", "\r", "\n", " ", "中文", " ", "かな", " "],
    ),
    "deepseek-coder": ("A 12 b!?\n 中文x", ["A", " ", "1", "2", " b", "!?", "\n", " ", "中文", "x"]),
    "deepseek-v3": ("A 12345 b!x中文かなé", ["A", " ", "123", "45", " b", "!x", "中文かな", "é"]),
    "llama-bpe": ("A 12345'LL b!\n\n  c", ["A", " ", "123", "45", "'LL", " b", "!\n\n", " ", " c"]),
    "gpt-4o": ("ABcd'll x/\n", ["ABcd'll", " x", "/\n"]),
    "tekken": ("ABcd'll 12", ["ABcd", "'ll", " ", "1", "2"]),
}


@pytest.mark.parametrize("pre", CUTS)
def test_a_text_is_cut_as_the_models_own_files_cut_it(pre):
    text, cuts = CUTS[pre]
    backend = build_tokenizer(byte_level(pre))
    found = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in found] == cuts


def test_names_of_one_kind_are_one():
    for one, other in [("llama3", "llama-bpe"), ("starcoder", "smollm"), ("refact", "codeshell"), ("phi-2", "gpt-2")]:
        assert PRE_TOKENIZERS[one] == PRE_TOKENIZERS[other]
    assert "pre" not in byte_level(pre=None) and build_tokenizer(byte_level(pre=None)).to_str() == (
        build_tokenizer(byte_level(pre="default")).to_str()
    )


@pytest.mark.parametrize(
    ("metadata", "before", "after"),
    [
        (byte_level(), [], []),
        (byte_level("llama-bpe"), [0], []),
        (byte_level("tekken"), [0], []),
        (byte_level("llama-bpe", add_bos_token=False), [], []),
        (byte_level(add_bos_token=True, add_eos_token=np.bool_(True)), [0], [1]),
        (byte_level(add_bos_token=True, bos_token_id=np.uint32(2)), [2], []),
        (byte_level(add_bos_token=True, bos_token_id=None), [], []),
        (sentencepiece("bpe_bytes"), [1], []),
        (sentencepiece("bpe_bytes", add_bos_token=False, add_eos_token=True), [], [2]),
    ],
)
def test_start_and_end_tokens(metadata, before, after):
    tokenizer = Tokenizer.from_gguf(metadata, "a.gguf")
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [*before, *plain, *after]


@pytest.mark.parametrize(
    ("pre", "is_whole"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)]
)
def test_a_word_of_the_vocabulary_that_no_merge_makes(pre, is_whole):
    tokens = [*BYTE_LEVEL["tokens"], "qzqz"]
    ids = build_tokenizer(byte_level(pre, tokens=tokens, token_type=None)).encode("qzqz", add_special_tokens=False).ids
    assert (ids == [len(tokens) - 1]) == is_whole


def test_types_of_tokens():
    tokens = [*BYTE_LEVEL["tokens"], "<think>", "[PAD1]"]
    kinds = [3, 3, 3] + [1] * (len(tokens) - 5) + [4, 5]
    tokenizer = Tokenizer(build_tokenizer(byte_level(tokens=tokens, token_type=kinds)))
    number = len(tokens)
    assert tokenizer.encode("<think>") == [number - 2] and tokenizer.decode([number - 2]) == "<think>"
    assert number - 1 not in tokenizer.encode("[PAD1]") and tokenizer.backend.id_to_token(number - 1) == "[PAD1]"
    assert set(tokenizer.special_tokens) == {0, 1, 2} and tokenizer.vocab_size == number
    # Without types those with a role are special.
    assert set(Tokenizer(build_tokenizer(byte_level(token_type=None))).special_tokens) == {0, 1}
    pieces = sentencepiece("bpe_bytes", token_type=[2, 3, 3] + [1] * 1198)
    assert set(Tokenizer(build_tokenizer(pieces)).special_tokens) == {0, 1, 2}


def test_a_sentencepiece_vocabulary_with_merges():
    """As Gemma 4's; the merges are those that the scores stand for."""
    from decodax.models.tokenizers.vocabulary import merges_by_rank

    pieces = read_sentencepiece(GOLDEN / "bpe_bytes.model").pieces
    ranked = sorted((piece for piece in pieces if piece.kind is PieceKind.NORMAL), key=lambda piece: -piece.score)
    merges = [" ".join(pair) for pair in merges_by_rank([piece.text for piece in ranked])]
    tokenizer = Tokenizer(build_tokenizer(sentencepiece("bpe_bytes", model="gemma4", merges=merges)))
    given = [" " + text for text in texts(look_alikes=False)]  # this kind puts no space before a text
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in given]
    assert checksums(rows) == expected("bpe_bytes")
    assert [tokenizer.decode(row) for row in rows] == given


def test_templates_and_named_tokens_of_a_file():
    metadata = byte_level(padding_token_id=2, unknown_token_id=None) | {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "tokenizer.chat_template.rag": "{{ pad_token }}",
        "tokenizer.chat_templates": ["rag"],
    }
    assert named_tokens(metadata) == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|im_end|>"}
    assert sorted(gguf_chat_templates(metadata)) == ["default", "rag"]
    tokenizer = Tokenizer.from_gguf(metadata, "a.gguf")
    question = [{"role": "user", "content": "a"}]
    assert tokenizer.encode_chat(question) == [0, *tokenizer.encode("a")]
    assert tokenizer.apply_chat_template(question, chat_template="rag") == "<|im_end|>"
    assert gguf_chat_templates({}) == {}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, r"a\.gguf: tokenizer\.ggml\.model must be the kind of vocabulary, a text, got None"),
        (
            byte_level(model="bert"),
            r"ggml\.model must be llama .* or gpt2 \(byte-level BPE\), got bert: use",
        ),
        (
            byte_level("kimi-k2"),
            r"ggml\.pre must be one of default, llama3, .*, got kimi-k2: use the",
        ),
        (byte_level(pre=5), r"ggml\.pre must be a name of a pre-tokenizer, got 5"),
        (byte_level(tokens=None), r"ggml\.tokens must be a list of texts, got None"),
        (byte_level(tokens=[1, 2]), r"ggml\.tokens must be a list of texts"),
        (byte_level(tokens=["a", "a"], token_type=None), "must have each token once, got 'a' twice"),
        (byte_level(merges=None), r"ggml\.merges must be a list of texts"),
        (byte_level(merges=["ab"]), r"ggml\.merges must hold two tokens with a space between, got 'ab'"),
        (byte_level(merges=["a "]), r"ggml\.merges must hold two tokens"),
        (byte_level(merges=["a \u4e00"]), r"must merge tokens into tokens, got '\u4e00', which is none of the 811"),
        (byte_level(token_type=[1]), r"ggml\.token_type must have a number in 0\.\.6 for each of the 811 tokens"),
        (byte_level(token_type=[7] * 811), r"ggml\.token_type must have a number in 0\.\.6"),
        (byte_level(bos_token_id=811), r"ggml\.bos_token_id must be a token id in 0\.\.810, got 811"),
        (byte_level(eos_token_id="1"), r"ggml\.eos_token_id must be a token id in 0\.\.810, got '1'"),
        (byte_level(add_bos_token=1), r"ggml\.add_bos_token must be true or false, got 1"),
        (sentencepiece("bpe_bytes", scores=None), r"ggml\.scores must have a number for each of the 1201 tokens"),
        (sentencepiece("bpe_bytes", scores=[0.0]), r"ggml\.scores must have a number for each"),
        (sentencepiece("bpe_bytes", add_space_prefix="no"), r"ggml\.add_space_prefix must be true or false, got 'no'"),
        (sentencepiece("bpe_bytes", token_type=[1] * 1201), "must have one unknown piece, got 0"),
        (byte_level() | {"tokenizer.chat_template": 5}, "the chat template default must be a text, got 5"),
    ],
)
def test_damaged_values_are_refused_by_key(metadata, message):
    with pytest.raises(ValueError, match=re.compile(message)) as error:
        Tokenizer.from_gguf(metadata, "a.gguf")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
