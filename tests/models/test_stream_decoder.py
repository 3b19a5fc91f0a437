"""Streamed pieces add up to the text that all tokens add to the prompt, and never hold half a character."""

import random

import pytest

from decodax.models.tokenizers.stream_decoder import StreamDecoder
from decodax.models.tokenizers.tokenizer import Tokenizer
from tests.small_tokenizers import KINDS

TOKENIZERS = {name: Tokenizer(make()) for name, make in KINDS.items()}
BYTE_FALLBACK = TOKENIZERS["byte_fallback"]
TEXTS = [
    "",
    "def f(x):\n    return x",
    "naïve Ünïcödé, 漢字かな",
    "👩‍👩‍👧 done 🎉🎉",
    "ends in \ufffd",
    "a\ufffdb \ufffd\ufffd c",
]
SCRIPTS = [
    "안녕하세요",
    "ขอบคุณ",
    "❤️❤️",
    "नमस्ते",
    "日本語テキスト",
    "😀😀😀",
    "ok 안녕",
    "a\ufffd\ufffd\ufffd\ufffd\ufffd",
]


def fallback_bytes(content):
    """The byte tokens for these bytes."""
    return [BYTE_FALLBACK.backend.token_to_id(f"<0x{value:02X}>") for value in content]


def pushed(tokenizer, pieces, prompt=(), **options):
    """The pieces that a stream yields, the flushed rest last."""
    stream = StreamDecoder(tokenizer, prompt=prompt, **options)
    return [*(stream.push(piece) for piece in pieces), stream.flush()]


def split(generator, tokens):
    """The tokens in random pieces of 0 to 3."""
    pieces, index = [], 0
    while index < len(tokens):
        size = generator.randrange(4)
        pieces.append(tokens[index : index + size])
        index += size
    return pieces


def added(tokenizer, prompt, tokens, **options):
    """What the tokens add to the prompt's text, by decoding everything: from the first character that differs on."""
    before = tokenizer.decode(prompt, **options)
    text = tokenizer.decode([*prompt, *tokens], **options)
    common = next(
        (i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text))
    )
    return text[common:]


def random_tokens(generator, tokenizer, count):
    """Any ids, texts of many scripts and fragments of them, runs of one id, and ids without a token."""
    tokens = []
    while len(tokens) < count:
        text = tokenizer.encode(generator.choice(SCRIPTS), add_special_tokens=False)
        any_id = generator.randrange(tokenizer.vocab_size)
        tokens += generator.choice(
            [text, text[: generator.randrange(9)], text[generator.randrange(9) :], [any_id], [any_id] * 11, [10**6]]
        )
    return tokens[:count]


@pytest.mark.parametrize("skip", [True, False], ids=["without_special", "with_special"])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_what_the_tokens_add_to_the_prompt(kind, skip):
    tokenizer = TOKENIZERS[kind]
    options = {"skip_special_tokens": skip}
    for seed in range(25):
        generator = random.Random(seed)
        tokens = random_tokens(generator, tokenizer, 70)
        cut = generator.choice([0, 1, 2, 5, 9, 17, 33])
        prompt, tokens = tokens[:cut], tokens[cut:]
        pieces = pushed(tokenizer, split(generator, tokens), prompt, **options)
        assert "".join(pieces) == added(tokenizer, prompt, tokens, **options), (seed, prompt, tokens)


@pytest.mark.parametrize("kind", ["byte_fallback", "byte_fallback_gemma", "byte_level"])
def test_text_follows_a_prompt_of_any_script(kind):
    tokenizer = TOKENIZERS[kind]
    space = " " if kind == "byte_fallback" else ""  # its normalizer puts one before every text
    for before in SCRIPTS:
        for after in SCRIPTS:
            tokens = [[token] for token in tokenizer.encode(after)]
            assert "".join(pushed(tokenizer, tokens, tokenizer.encode(before * 3))) == space + after


def test_a_character_begun_in_the_prompt_belongs_to_the_tokens_that_complete_it():
    han = fallback_bytes("한".encode())
    assert "".join(pushed(BYTE_FALLBACK, [han[1:]], [5, *han[:1]])) == "한"
    assert "".join(pushed(BYTE_FALLBACK, [han[1:2], han[2:]], han * 3 + han[:1])) == "한"
    for prompt, tokens, expected in [
        (han[:2], fallback_bytes(b"x"), "x"),  # never completed
        (han, han[:2], "\ufffd\ufffd"),  # unfinished itself: what came before stays
        (han[:1], [], ""),
        ([1, 2], fallback_bytes(b" x"), "x"),  # only special tokens before: the first space is dropped
    ]:
        assert "".join(pushed(BYTE_FALLBACK, [tokens], prompt)) == expected


def test_invalid_bytes_are_replaced_one_by_one_without_waiting():
    wrong = fallback_bytes(b"\x80")
    han = fallback_bytes("한".encode())
    pieces = pushed(BYTE_FALLBACK, [wrong] * 20 + [han, fallback_bytes(b"a"), wrong, han])
    assert pieces[3:20] == ["\ufffd"] * 17 and "".join(pieces) == "\ufffd" * 20 + "한a\ufffd한"
    assert BYTE_FALLBACK.decode(han * 3 + han[:2]) == "한한한\ufffd\ufffd"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_complete_and_none_is_lost(kind, text):
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode(text * 5)
    for seed in range(5):
        pieces = pushed(tokenizer, split(random.Random(seed), tokens))
        assert "".join(pieces) == tokenizer.decode(tokens) == text * 5
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_comes_with_its_last_byte(kind):
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode("aö漢🎉b", add_special_tokens=False)
    pieces = pushed(tokenizer, [[token] for token in tokens])
    assert [piece for piece in pieces if piece] == ["a", "ö", "漢", "🎉", "b"]
    assert pushed(tokenizer, [tokens[:-2]])[0] == "aö漢"


def test_the_cost_of_a_push_does_not_grow(monkeypatch):
    """After anything: long texts, invalid bytes, special tokens, ids without a token."""
    longest = 0
    join = Tokenizer.join

    def watched(self, token_texts):
        nonlocal longest
        longest = max(longest, len(token_texts))
        return join(self, token_texts)

    monkeypatch.setattr(Tokenizer, "join", watched)
    wrong = fallback_bytes(b"\x80") * 200
    han = fallback_bytes("한".encode()) * 100
    for kind, tokens in [
        ("byte_fallback", wrong),
        ("byte_fallback", han),
        ("byte_fallback", [5, *[2] * 300, 5, *[10**6] * 300, 6, 7]),
        ("byte_level", TOKENIZERS["byte_level"].encode("é漢🎉" * 50)),
        ("whole_words", [5, 6, 7] * 70),
    ]:
        for prompt in ([], tokens):
            stream = StreamDecoder(TOKENIZERS[kind], prompt=prompt)
            for token in tokens:
                stream.push([token])
    assert longest < 40
