"""Chat templates are found where transformers finds them; damaged files are one clear error each."""

import json
import os

import pytest

from decodax.models.checkpoints.hub import _DOWNLOADED, _IGNORED
from decodax.models.tokenizers.chat_template_files import read_chat_templates
from decodax.models.tokenizers.tokenizer import Tokenizer
from tests.small_tokenizers import byte_level

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
QUESTION = [{"role": "user", "content": "a"}]


def written(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


NAMED = [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {}),
        ({CONFIG: {}}, {}),
        ({CONFIG: {"chat_template": None}}, {}),
        ({CONFIG: {"chat_template": "c"}}, {"default": "c"}),
        ({CONFIG: {"chat_template": NAMED}}, {"default": "d", "rag": "r"}),
        ({CONFIG: {"chat_template": "c"}, FILE: "f"}, {"default": "f"}),
        ({CONFIG: {"chat_template": NAMED}, FILE: "f"}, {"default": "f"}),
        ({FILE: "é\r\n\r"}, {"default": "é\n\n"}),
        ({FILE: "f", "additional_chat_templates/rag.jinja": "r"}, {"default": "f", "rag": "r"}),
        ({CONFIG: {"chat_template": "c"}, "additional_chat_templates/a.b.jinja": "x"}, {"a.b": "x"}),
        ({"additional_chat_templates/README.md": "x"}, {}),
    ],
)
def test_templates_by_name(tmp_path, files, expected):
    assert read_chat_templates(written(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({FILE: b"\xff"}, r"chat_template\.jinja must be text in UTF-8"),
        (
            {FILE: "a" * (2**20 + 1)},
            r"chat_template\.jinja has 1,048,577 bytes; a template of more",
        ),
        (
            {CONFIG: {"chat_template": 5}},
            r"chat_template in .*tokenizer_config\.json must be a text, or a list",
        ),
        ({CONFIG: {"chat_template": ["a"]}}, "must be a text, or a list of objects"),
        ({CONFIG: {"chat_template": [{"name": "a"}]}}, "must be a text, or a list of objects"),
        ({CONFIG: {"chat_template": {"default": "a"}}}, "must be a text, or a list of objects"),
    ],
)
def test_damaged_files_are_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read_chat_templates(written(tmp_path, files))


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    written(tmp_path / "model", {}).mkdir()
    (tmp_path / "secret").write_text("x")
    os.symlink("../secret", tmp_path / "model" / FILE)
    with pytest.raises(ValueError, match=r"outside the model's folder"):
        read_chat_templates(tmp_path / "model")


def test_a_folder_s_tokenizer_has_its_templates_and_named_tokens(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "image_token": "<i>", "add_bos_token": True}
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ image_token }}{{ x }}"
    written(tmp_path, {CONFIG: settings | {"chat_template": template}})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    assert tokenizer.apply_chat_template(QUESTION) == "<s>a<|im_end|><i>"
    assert tokenizer.apply_chat_template(QUESTION, x="!", eos_token="?") == "<s>a?<i>!"
    ids = tokenizer.encode_chat(QUESTION)
    assert ids == [1, *tokenizer.encode("a", add_special_tokens=False), 3, tokenizer.backend.token_to_id("<i>")]
    with pytest.raises(ValueError, match=r"^.*tokenizer\.json has no chat template"):
        Tokenizer(tokenizer.backend, source=f"{tmp_path}/tokenizer.json").apply_chat_template(QUESTION)


def test_templates_are_downloaded_and_folders_are_not():
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model.safetensors", "tokenizer.model", FILE]
    others = ["onnx/config.json", "original/x.safetensors", "consolidated.safetensors"]
    found = filter_repo_objects([*others, *wanted], allow_patterns=_DOWNLOADED, ignore_patterns=_IGNORED)
    assert list(found) == wanted
