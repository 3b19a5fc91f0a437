"""End token ids: which file gives them, and the warning for ids outside the vocabulary."""

import json
import os
import warnings

import pytest

from decodax.models.tokenizers.generation_settings import read_end_token_ids

CONFIG, GENERATION = "config.json", "generation_config.json"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({CONFIG: {"eos_token_id": 2}}, (2,)),
        ({CONFIG: {"eos_token_id": [2, 5, 2]}}, (2, 5)),
        ({CONFIG: {"eos_token_id": 2}, GENERATION: {"eos_token_id": [7, 8]}}, (7, 8)),
        ({CONFIG: {"eos_token_id": 2}, GENERATION: {"eos_token_id": 0}}, (0,)),
        ({CONFIG: {"eos_token_id": 2}, GENERATION: {"eos_token_id": None}}, (2,)),
        ({CONFIG: {"eos_token_id": 2}, GENERATION: {"eos_token_id": []}}, (2,)),
        ({CONFIG: {"eos_token_id": 99}, GENERATION: {"eos_token_id": 10}}, (10,)),  # config.json's do not count
    ],
)
def test_end_token_ids(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_end_token_ids(tmp_path, 11) == expected


@pytest.mark.parametrize("name", [CONFIG, GENERATION])
@pytest.mark.parametrize(
    ("value", "expected", "message"),
    [
        ([2, 11], (2,), r"must be in 0\.\.10 .* got 11, which .*: a text ends at 2$"),
        ([3, -1, 32000, 5], (3, 5), "got -1, 32000, which .*: a text ends at 3, 5$"),
        (11, (), "got 11, which .*: a text has no end token"),
        (-1, (), "got -1, which .*: a text has no end token"),
        (10**400, (), r"got 10*\.\.\.0*, which .*: a text has no end token"),
    ],
)
def test_ids_outside_the_vocabulary_are_left_out_with_a_warning(tmp_path, name, value, expected, message):
    (tmp_path / CONFIG).write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.warns(UserWarning, match=message) as said:
        assert read_end_token_ids(tmp_path, 11) == expected
    assert [str(tmp_path / name) in str(warning.message) for warning in said] == [True]


@pytest.mark.parametrize("content", ["[" * 10**5, '{"a": ' * 99 + "1" + "}" * 99])
def test_a_malformed_generation_config_is_refused(tmp_path, content):
    (tmp_path / CONFIG).write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / GENERATION).write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json is JSON nested deeper than 64 levels"):
        read_end_token_ids(tmp_path, 11)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        '{"eos_token_id": 3,}',
        '{"eos_token_id": 3 "a": 1}',
        "3",
        "null",
        b'{"eos_token_id": "\xff"}',
        '{"eos_token_id": "x"}',
        '{"eos_token_id": true}',
        '{"eos_token_id": 3.5}',
        '{"eos_token_id": [3, null]}',
        '{"eos_token_id": [[3]]}',
        '{"eos_token_id": {"a": 3}}',
    ],
)
def test_a_damaged_generation_config_is_not_used(tmp_path, content):
    (tmp_path / CONFIG).write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / GENERATION).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(
        UserWarning, match=r"generation_config\.json.*; the file is not used, but eos_token_id of config"
    ):
        assert read_end_token_ids(tmp_path, 11) == (2,)


def test_a_damaged_config_and_a_dangling_link_are_errors(tmp_path):
    for content, message in [
        ('{"eos_token_id": "x"}', r'eos_token_id in .*config\.json must be a token id or a list of them, got "x"'),
        ('{"eos_token_id": [3, null]}', "must be a token id"),
        ("[", "no valid JSON"),
    ]:
        (tmp_path / CONFIG).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_end_token_ids(tmp_path, 11)
    os.symlink("../../blobs/0", tmp_path / GENERATION)
    with pytest.raises(ValueError, match=r"generation_config\.json is a link to .*, which is not there"):
        read_end_token_ids(tmp_path, 11)


def test_an_intact_folder_gives_no_warning(tmp_path):
    (tmp_path / GENERATION).write_text(json.dumps({"eos_token_id": [0, 10]}))
    with warnings.catch_warnings(action="error"):
        assert read_end_token_ids(tmp_path, 11) == (0, 10)
