"""A tekken.json encodes by the ranks of its tokens, as tiktoken does; damaged files are one clear error each."""

import base64
import itertools
import json
import re

import pytest

from decodax.models.tokenizers.tokenizer import Tokenizer
from decodax.models.tokenizers.vocabulary import merges_by_rank
from tests.many_scripts import texts

# Of the bytes, then longer tokens: "bc" before "ab", so "abc" is a+bc; " abc" whole, though no merge makes it last.
LONGER = [b"bc", b"ab", b" a", b" abc", b"\xc3\xa9", "日".encode()[:2], "日".encode(), b"12", b"  ", b"<s>x", b"xyz"]
PATTERN = r"\p{N}| ?\p{L}+|[^\p{L}\p{N}\s]+|\s+"


def content(**changes):
    tokens = [bytes([value]) for value in range(256)] + LONGER
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(tokens)]
    number = len(tokens)
    config = {"pattern": PATTERN, "default_vocab_size": number + 23, "default_num_special_tokens": 23}
    # Files hold more tokens than count.
    surplus = {"rank": number, "token_bytes": base64.b64encode(b"abcabc").decode()}
    return {"config": config | {"num_vocab_tokens": number + 1}, "vocab": [*vocab, surplus]} | changes


def loaded(folder, value):
    (folder / "tekken.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return Tokenizer.from_folder(folder)


def by_rank(text):
    """The ids of a text, by tiktoken's rule: merge the pair that makes the token of the lowest rank, from the left."""
    rank = {bytes([value]): value for value in range(256)} | {token: 256 + i for i, token in enumerate(LONGER)}
    ids = []
    for cut in re.findall(r"[0-9]| ?[^\W\d_]+|[^\w\s]+|_+|\s+", text):
        parts = [bytes([value]) for value in cut.encode()]
        while cut.encode() not in rank:
            made = [rank.get(left + right, 10**9) for left, right in itertools.pairwise(parts)]
            if min(made, default=10**9) == 10**9:
                break
            place = made.index(min(made))
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [rank[part] + 23 for part in ([cut.encode()] if cut.encode() in rank else parts)]
    return ids


def test_ids_are_by_rank(tmp_path):
    tokenizer = loaded(tmp_path, content())
    given = ["abc", " abc abc", "é日本 ab12", "aabcc bcbc   x", "", "日", "xyz xyzx"]
    for text in given:
        assert tokenizer.encode(text, add_special_tokens=False) == by_rank(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(by_rank("xyz")) == 1  # which no merge makes
    assert by_rank("abc")[0] == 23 + ord("a") and len(by_rank(" abc")) == 1
    for text in texts(101):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) in (f"<s>{text}", text)


def test_merges_are_in_the_order_of_ranks():
    merges = merges_by_rank(["a", "b", "c", "bc", "abc", "ab"])
    assert merges == [("b", "c"), ("a", "bc"), ("ab", "c"), ("a", "b")]


def test_special_tokens_come_first_and_begin_a_text(tmp_path):
    tokenizer = loaded(tmp_path, content())
    assert tokenizer.encode("[INST]a[/INST]") == [1, 3, 23 + ord("a"), 4]
    assert tokenizer.encode("<s>a") == [1, 23 + ord("a")]
    assert tokenizer.backend.id_to_token(22) == "<SPECIAL_22>" and len(tokenizer.special_tokens) == 23
    assert tokenizer.vocab_size == 23 + 256 + len(LONGER)
    assert tokenizer.named_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    listed = [{"rank": 2, "token_str": "[END]"}, {"rank": 1, "token_str": "<s>"}, {"rank": 0, "token_str": "<unk>"}]
    assert loaded(tmp_path, content(special_tokens=listed)).encode("[END][INST]")[:2] == [1, 2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1]", "must hold a JSON object"),
        ({}, r"must have config \(pattern, .*\) and vocab .*: KeyError\('config'\)"),
        (content(config={"pattern": "a"}), r"must have config .*KeyError\('default_vocab_size'\)"),
        (content(config=[1]), "must have config"),
        (content(vocab=[{"rank": 0, "token_bytes": "!"}]), "must have config .* and vocab"),
        (content(vocab=[{"rank": 5, "token_bytes": "YQ=="}]), "vocab must be in the order of its ranks, got 5 at 0"),
        (content(vocab=[{"rank": 0, "token_bytes": "YQ=="}]), "vocab must have 267 tokens, got 1"),
        (content(special_tokens=[{"rank": 0}]), "must have config"),
        (
            content(special_tokens=[{"rank": r, "token_str": "a"} for r in (0, 1)]),
            "must have each token once, got 'a' twice",
        ),
        (content(special_tokens=[]), r"lacks '<s>', which is to begin or end a text"),
        (
            content(config={"pattern": "a", "default_vocab_size": 10**12, "default_num_special_tokens": 10**11}),
            r"default_vocab_size, and that at most 2,097,152, got 100000000000 and 1000000000000",
        ),
        (content(config=content()["config"] | {"default_num_special_tokens": "5"}), "must be below default_vocab_size"),
        (content(config=content()["config"] | {"pattern": "("}), r"tekken\.json"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, value, message):
    with pytest.raises(ValueError, match=message) as error:
        loaded(tmp_path, value)
    assert "\n" not in str(error.value)
