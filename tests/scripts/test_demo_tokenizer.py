"""The demo tokenizer is lossless on any text, and made for indented code."""

import random

import pytest
from tokenizers import Tokenizer

from decodax.scripts import demo_tokenizer

pytestmark = pytest.mark.slow

SOURCE = (
    "class Number:\n    def add(self, other):\n        if other is None:\n            return self\n        return 1\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    return demo_tokenizer.train([SOURCE * 20, "x = 12345\n\n\n# été\r\n\t\u03b1  \u03b2"], vocabulary=400)


def texts():
    """Awkward texts, and random ones from all of Unicode but the surrogates, which UTF-8 cannot write."""
    yield from [
        "",
        " ",
        "\n",
        "  \n\n \t x",
        "\r\n a\r\nb\r",
        "a\u00a0b\u3000c\u2028d",
        "\0\x7f",
        "e\u0301 ﬁ İ ß",
        SOURCE,
    ]
    yield from [
        "\U0001d518\U0001d52b \U0001f469\u200d\U0001f467 \U0010ffff",
        "1234567 1 22  333",
        "    def f(): # x\n\n\n\n        y",
        "<|endof",
        "a" * 500,
    ]
    draw = random.Random(0)
    for length in (1, 7, 63, 200):
        points = [draw.randrange(0x110000) for _ in range(length)] + [draw.randrange(256) for _ in range(length)]
        yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def test_every_text_comes_back_exactly(tokenizer):
    for text in texts():
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_the_separator_is_token_zero_and_never_added(tokenizer):
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert 0 not in tokenizer.encode(SOURCE).ids
    assert tokenizer.encode("<|endoftext|>").ids == [0]


def test_all_bytes_are_in_the_vocabulary(tokenizer):
    # Every code point below 0x80, and the lead and continuation bytes of all others.
    ids = {token for point in [*range(0x80), *range(0x80, 0x110000, 0x3F)] if not 0xD800 <= point < 0xE000
           for token in tokenizer.encode(chr(point)).ids}  # fmt: skip
    assert None not in ids and tokenizer.get_vocab_size() <= 400


def test_a_line_break_and_its_indentation_are_one_token(tokenizer):
    tokens = tokenizer.encode(SOURCE).tokens
    for depth in (4, 8, 12):
        assert "Ċ" + "Ġ" * depth in tokens


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="at least 257 tokens, got 256"):
        demo_tokenizer.train(["x"], vocabulary=256)


def test_saved_files_are_read_back(tokenizer, tmp_path):
    demo_tokenizer.save(tokenizer, tmp_path / "new", 1024)
    again = Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert again.encode(SOURCE).ids == tokenizer.encode(SOURCE).ids
