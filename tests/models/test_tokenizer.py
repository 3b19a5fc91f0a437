"""Text to ids and back: special tokens as the files say, and streams that never hand out half a character."""

import json
import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from decodax.models.tokenizer import StreamDecoder, Tokenizer, read_end_token_ids

TEXTS = [
    "",
    "def f(x):\n    return x",
    "naïve Ünïcödé, 漢字かな",
    "👩‍👩‍👧 done 🎉🎉",
    "ends in \ufffd",
    "a\ufffdb \ufffd\ufffd c",
]


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


def byte_fallback():
    """As in Llama 1 and 2: words with a mark for the space before them, all else as bytes; drops the first space."""
    words = ["<unk>", "▁a", "▁word", "s", "▁", *(f"<0x{value:02X}>" for value in range(256))]
    backend = Backend(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return backend, words


def saved(folder, backend, **settings):
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.from_folder(folder)


def pushed(tokenizer, pieces):
    """What a stream hands out piece by piece, the flushed rest last."""
    stream = StreamDecoder(tokenizer)
    return [*(stream.push(piece) for piece in pieces), stream.flush()]


def split(generator, tokens):
    """The tokens in random pieces of 0 to 3."""
    pieces, index = [], 0
    while index < len(tokens):
        size = generator.randrange(4)
        pieces.append(tokens[index : index + size])
        index += size
    return pieces


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


@pytest.mark.parametrize("text", TEXTS)
def test_stream_hands_out_whole_characters_and_all_of_them(tmp_path, text):
    tokenizer = saved(tmp_path, byte_level())
    tokens = tokenizer.encode(text * 5)
    for seed in range(5):
        pieces = pushed(tokenizer, split(random.Random(seed), tokens))
        assert "".join(pieces) == tokenizer.decode(tokens) == text * 5
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_hands_out_a_character_with_its_last_byte(tmp_path):
    tokenizer = saved(tmp_path, byte_level())
    pieces = pushed(tokenizer, [[token] for token in tokenizer.encode("aé漢🎉b")])
    assert pieces == ["a", "", "é", "", "", "漢", "", "", "", "🎉", "b", ""]


def test_stream_flushes_an_unfinished_character(tmp_path):
    tokenizer = saved(tmp_path, byte_level())
    assert pushed(tokenizer, [tokenizer.encode("a🎉")[:-1]]) == ["a", "\ufffd"]


def test_stream_is_decode_where_the_decoder_depends_on_the_start(tmp_path):
    backend, words = byte_fallback()
    tokenizer = saved(tmp_path, backend)
    end = backend.token_to_id("</s>")
    euro = [words.index(f"<0x{value:02X}>") for value in "€".encode()]
    vocabulary = [[1], [2], [3], [4], [end], [end] * 10, euro, euro * 15]
    for seed in range(30):
        generator = random.Random(seed)
        tokens = [token for _ in range(40) for token in generator.choice(vocabulary)]
        pieces = pushed(tokenizer, split(generator, tokens))
        assert "".join(pieces) == tokenizer.decode(tokens)
        assert not any("\ufffd" in piece for piece in pieces)


def test_stream_decodes_a_bounded_window(tmp_path):
    """The cost of a push does not grow with what came before."""
    tokenizer = saved(tmp_path, byte_level())
    longest = 0

    class Watched(Tokenizer):
        def decode(self, tokens, **options):
            nonlocal longest
            longest = max(longest, len(tokens))
            return tokenizer.decode(tokens, **options)

    for text in ("é" * 300, "漢" * 200, "🎉" * 150, "plain " * 100):
        stream = StreamDecoder(Watched(tokenizer.backend))
        assert "".join(stream.push([token]) for token in tokenizer.encode(text)) == text
    assert longest < 30


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"config.json": {"eos_token_id": 2}}, (2,)),
        ({"config.json": {"eos_token_id": [2, 5]}}, (2, 5)),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": [7, 8]}}, (7, 8)),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": 0}}, (0,)),
        ({"config.json": {"eos_token_id": 2}, "generation_config.json": {"eos_token_id": None}}, (2,)),
    ],
)
def test_end_token_ids(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_end_token_ids(tmp_path) == expected


def test_bad_end_token_ids(tmp_path):
    for content, expected in [
        ('{"eos_token_id": "x"}', "must be a token id"),
        ("[", "no valid JSON"),
        ("3", "JSON object"),
    ]:
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match=expected):
            read_end_token_ids(tmp_path)
