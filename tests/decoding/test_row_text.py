"""A row's text ends at a stop string: special tokens in stop strings, any script, any split of the tokens."""

import random
import re

import pytest

from decodax.decoding.row_text import RowText, _StopSearch
from decodax.models.tokenizers.tokenizer import Tokenizer
from tests.small_tokenizers import KINDS, SPECIAL

TOKENIZERS = {name: Tokenizer(make()) for name, make in KINDS.items()}
END = "<|im_end|>"
PARTS = ["a", " word", "안녕", "😀", "\n", "ing", "</s>", END, END, "s"]


def ids(kind, text):
    return TOKENIZERS[kind].backend.encode(text, add_special_tokens=False).ids


def read(kind, tokens, stops, prompt=(), split=None):
    """(text, number of tokens kept) after these tokens, pushed in pieces of random sizes."""
    row = RowText(TOKENIZERS[kind], list(prompt), stops)
    generator = random.Random(split)
    while tokens:
        size = 1 if split is None else generator.randrange(1, 5)
        row.read(tokens[:size])
        tokens = tokens[size:]
    row.finish()
    return row.text, row.num_kept


@pytest.mark.parametrize("split", [None, 1, 2])
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        ([END], ("w5 w6", 3)),
        (["never", END], ("w5 w6", 3)),
        ([f"w6 {END}"], ("w5 ", 3)),
        ([f"6 {END}"], ("w5 w", 3)),
        ([f"{END} w7"], ("w5 w6", 4)),
        ([f"{END} w7 </s> w8 w"], ("w5 w6", 7)),
        (["w7 </s> w8"], ("w5 w6 ", 6)),
        (["</s>"], ("w5 w6 w7", 5)),
        (["w7 w8"], ("w5 w6 ", 6)),  # what the text shows
        ([f"w6 w7 {END}"], ("w5 w6 w7 w8 w9", None)),  # another order than that of the tokens
        (["im_end"], ("w5 w6 w7 w8 w9", None)),  # a substring of a special token, which the text does not show
        ([f"w9 {END}", "w6"], ("w5 ", 2)),
    ],
)
def test_special_tokens_in_stop_strings(stops, expected, split):
    tokens = ids("whole_words", f"w5 w6 {END} w7 </s> w8 w9")
    assert read("whole_words", tokens, stops, prompt=[1], split=split) == expected


def test_a_special_token_that_absorbs_the_first_space():
    tokens = ids("whole_words", f"{END} w7 </s>")
    assert read("whole_words", tokens, ["w7 </s>"], prompt=[1]) == ("", 3)


def text_of(kind, tokens, prompt, **options):
    """What the tokens add to the prompt's text."""
    tokenizer = TOKENIZERS[kind]
    return tokenizer.decode([*prompt, *tokens], **options)[len(tokenizer.decode(prompt, **options)) :]


@pytest.mark.parametrize("kind", ["byte_fallback", "byte_fallback_gemma", "byte_level"])
def test_random_tokens_and_stop_strings(kind):
    """Against the plain rule: look at the whole text after each token, take out the special tokens before a stop."""
    num_stopped = 0
    for seed in range(80):
        generator = random.Random(seed)
        prompt = ids(kind, "안녕 a" + "😀" * generator.randrange(5))
        tokens = ids(kind, "".join(generator.choices(PARTS, k=12)))
        whole = text_of(kind, tokens, prompt, skip_special_tokens=False)
        start = generator.randrange(len(whole))
        stops = [whole[start : start + generator.randrange(1, 9)], END][: generator.randrange(1, 3)]
        expected = (text_of(kind, tokens, prompt), None)
        for count in range(1, len(tokens) + 1):
            shown = text_of(kind, tokens[:count], prompt)
            marked = text_of(kind, tokens[:count], prompt, skip_special_tokens=False)
            cuts = [shown.find(stop) for stop in stops if stop in shown and "\ufffd" not in shown]
            for stop in stops:
                if any(special in stop for special in SPECIAL) and stop in marked:
                    hidden = re.sub("|".join(map(re.escape, SPECIAL)), lambda match: "\0" * len(match[0]), marked)
                    cuts.append(sum(character != "\0" for character in hidden[: marked.find(stop)]))
            if cuts:
                expected = (shown[: min(cuts)], count)
                num_stopped += 1
                break
        assert read(kind, tokens, stops, prompt, split=seed) == expected, (seed, stops)
    assert num_stopped > 40


def test_stop_strings_are_found_across_pieces_wherever_they_begin():
    stops = ["abc", "bcbcbcd", "d"]
    for seed in range(200):
        generator = random.Random(seed)
        text = "".join(generator.choices("abcd", [6, 6, 6, 1], k=30))
        search, at, found = _StopSearch(stops), 0, []
        while at < len(text) and not found:
            size = generator.randrange(0, 4)
            found = search.push(text[at : at + size])
            at += size
        shown = text[:at]
        assert found == [shown.find(stop) for stop in stops if stop in shown] and search.length == min(at, len(text))


class OneToken(Tokenizer):
    """Every token has the same text; counts the texts that are joined."""

    def __init__(self, kind, text):
        super().__init__(KINDS[kind]())
        self.one_text, self.num_joined = text, 0

    def token_texts(self, tokens, *, skip_special_tokens=True):
        is_hidden = skip_special_tokens and self.one_text in SPECIAL
        return [] if is_hidden else [self.one_text for _ in tokens]

    def join(self, token_texts):
        self.num_joined += len(token_texts)
        return super().join(token_texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["</s>", "a", "<0xE2>", ""])
@pytest.mark.quick_cases(7)
def test_the_work_of_a_token_does_not_grow_with_the_text(kind, text):
    tokenizer = OneToken(kind, text)
    row = RowText(tokenizer, [0], ["never", "</s>never"])
    row.read([0] * 400)
    first = tokenizer.num_joined
    row.read([0] * 2000)
    assert row.num_read == 2400 and 0 < tokenizer.num_joined - first <= 6 * first
