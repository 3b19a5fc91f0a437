"""Tokens that only files beside tokenizer.json add are in the vocabulary, with their ids and flags, or refused."""

import json

import pytest
from tokenizers import AddedToken

from decodax.models.tokenizers.tokenizer import Tokenizer
from tests.small_tokenizers import byte_level, whole_words

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def loaded(folder, backend, **files):
    """The tokenizer of a folder with these files; a file's name is given without its suffix."""
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer.from_folder(folder)


def flags(tokenizer, text):
    token = tokenizer.backend.get_added_tokens_decoder()[tokenizer.backend.token_to_id(text)]
    return {name for name in ("special", "normalized", "lstrip", "rstrip", "single_word") if getattr(token, name)}


NEW = "<|tool|>"  # gets the id 34, the first after those of whole_words()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"added_tokens": {NEW: 34}}, {"normalized"}),
        ({"added_tokens": {NEW: 34}, "special_tokens_map": {"additional_special_tokens": [NEW]}}, {"special"}),
        ({"added_tokens": {NEW: 34}, "tokenizer_config": {"eos_token": NEW}}, {"special"}),
        ({"tokenizer_config": {"added_tokens_decoder": {"34": {"content": NEW}}}}, {"normalized"}),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"34": {"content": NEW, "special": True, "lstrip": True}}}},
            {"special", "lstrip"},
        ),
        (
            {
                "tokenizer_config": {
                    "added_tokens_decoder": {"34": {"content": NEW, "rstrip": True, "single_word": True}}
                }
            },
            {"normalized", "rstrip", "single_word"},
        ),
        ({"tokenizer_config": {"eos_token": NEW, "added_tokens_decoder": {"34": {"content": NEW}}}}, {"special"}),
        ({"tokenizer_config": {"additional_special_tokens": [NEW]}}, {"special"}),
        ({"tokenizer_config": {"extra_special_tokens": [{"content": NEW, "lstrip": True}]}}, {"special", "lstrip"}),
        ({"tokenizer_config": {"extra_special_tokens": {"boi_token": NEW}}}, {"special"}),
        ({"tokenizer_config": {"image_token": NEW}}, {"special"}),
        ({"tokenizer_config": {"pad_token": {"__type": "AddedToken", "content": NEW}}}, {"special"}),
        ({"special_tokens_map": {"additional_special_tokens": [NEW]}}, {"special"}),
        ({"special_tokens_map": {"pad_token": {"content": NEW, "rstrip": True}}}, {"special", "rstrip"}),
        ({"special_tokens_map": {"extra_special_tokens": [NEW, "w3"]}}, {"special"}),
    ],
)
def test_a_token_that_another_file_adds_is_one_token(tmp_path, files, expected):
    tokenizer = loaded(tmp_path, whole_words(), **files)
    assert tokenizer.backend.token_to_id(NEW) == 34 and flags(tokenizer, NEW) == expected
    assert tokenizer.encode(f"w1 {NEW} w2") == [5, 34, 6]
    hidden = "special" in expected
    assert tokenizer.decode([5, 34, 6]) == ("w1 w2" if hidden else f"w1 {NEW} w2")
    assert tokenizer.decode([5, 34, 6], skip_special_tokens=False) == f"w1 {NEW} w2"


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config": {"added_tokens_decoder": {}}, "added_tokens": {NEW: 34}},  # the older files do not count
        {"tokenizer_config": {"added_tokens_decoder": {}}, "special_tokens_map": {"pad_token": NEW}},
        {"tokenizer_config": {"pad_token": None, "additional_special_tokens": []}},
    ],
)
def test_a_token_that_no_file_adds_is_unknown(tmp_path, files):
    assert loaded(tmp_path, whole_words(), **files).backend.token_to_id(NEW) is None


def test_tokens_of_the_vocabulary_become_special_in_place(tmp_path):
    """A special token need not be among the added ones of tokenizer.json."""
    tokenizer = loaded(tmp_path, whole_words(), tokenizer_config={"eos_token": "w7", "added_tokens_decoder": {}})
    assert tokenizer.vocab_size == 34 and tokenizer.decode([10, 11, 12]) == "w6 w8"


def test_flags_of_tokenizer_json_hold_unless_the_decoder_changes_them(tmp_path):
    backend = whole_words()
    backend.add_tokens([AddedToken(NEW, lstrip=True, normalized=False)])
    for files, expected in [
        ({"added_tokens": {NEW: 34}}, {"lstrip"}),
        ({"special_tokens_map": {"eos_token": NEW}}, {"lstrip"}),
        ({"tokenizer_config": {"added_tokens_decoder": {"34": {"content": NEW, "special": True}}}}, {"special"}),
    ]:
        assert flags(loaded(tmp_path, backend, **files), NEW) == expected


def test_several_tokens_get_ids_in_file_order_and_split_byte_level_text(tmp_path):
    count = byte_level().get_vocab_size()
    tokenizer = loaded(tmp_path, byte_level(), added_tokens={"<|b|>": count + 1, "<|a|>": count})
    tokens = tokenizer.encode("é<|b|>x<|a|>")
    assert tokens[2] == count + 1 and tokens[-1] == count and len(tokens) == 5
    assert tokenizer.decode(tokens) == "é<|b|>x<|a|>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {NEW: 35}}, rf"{ADDED} gives the added token '<\|tool\|>' the id 35, .* it is 34: "),
        ({"added_tokens": {NEW: 33}}, r"the id 33, .* it is 34, and 33 is 'w29'"),
        ({"added_tokens": {"w3": 34}}, r"added token 'w3' the id 34, .* it is 7"),
        ({"added_tokens": {NEW: 34, "<b>": 34}}, rf"{ADDED} must give each token an id of its own"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"2": {"content": NEW}}}},
            rf"{CONFIG} gives .* the id 2, .* '</s>'",
        ),
        ({"added_tokens": {NEW: "34"}}, rf"{ADDED} must give each token an id, got 34 for '<\|tool\|>'"),
        ({"added_tokens": {NEW: -1}}, "must give each token an id, got -1"),
        ({"added_tokens": {NEW: 2**60}}, "must give each token an id, got 1152"),
        ({"added_tokens": [NEW]}, rf"{ADDED} must hold a JSON object, got a list"),
        ({"tokenizer_config": {"added_tokens_decoder": [3]}}, "must be an object whose keys are token ids"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": NEW}}}}, "keys are token ids"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"34": 3}}},
            rf"added_tokens_decoder\.34 in .*{CONFIG} must be a",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"34": {"content": 3}}}},
            "must be a token's text, or an object",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"34": {"content": NEW, "lstrip": 1}}}},
            "must have true or false",
        ),
        ({"tokenizer_config": {"eos_token": 3}}, rf"eos_token in .*{CONFIG} must be a token's text"),
        ({"tokenizer_config": {"extra_special_tokens": 3}}, "extra_special_tokens in .* must be a list of tokens"),
        (
            {"special_tokens_map": {"additional_special_tokens": [3]}},
            rf"additional_special_tokens\.0 in .*{MAP} must be",
        ),
    ],
)
def test_bad_ids_and_fields_are_refused_by_name(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, whole_words(), **files)
