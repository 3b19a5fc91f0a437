"""`decodax generate --chat` asks prompts as questions; what a template is given with them reaches the library."""

import json
import re
import shutil

import pytest

import decodax
from decodax.decoding.options import GenerateOptions
from tests.test_cli import CHARACTERS, folder, generate, recorded, run

__all__ = ["folder", "recorded"]  # fixtures
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def chat_folder(folder, tmp_path_factory):
    """The model of `folder`, with a chat template."""
    with_template = tmp_path_factory.mktemp("chat") / "tiny"
    shutil.copytree(folder, with_template)
    (with_template / "chat_template.jinja").write_text(TEMPLATE + "{% if add_generation_prompt %}a{% endif %}")
    return with_template


def test_a_prompt_is_a_question(folder, recorded):
    assert generate(folder, "ab", "cd", "--chat").exit_code == 0
    _, prompts, options = recorded[0]
    assert prompts == [[{"role": "user", "content": "ab"}], [{"role": "user", "content": "cd"}]]
    assert GenerateOptions(**options) == GenerateOptions()


def test_options_reach_the_library(folder, recorded, tmp_path):
    for name, value in (("tools", [{"n": 1}]), ("documents", [{"text": "é"}])):
        (tmp_path / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "own.jinja").write_text("é{{ messages }}", encoding="utf-8")
    more = ["--system", "be", "--tools", tmp_path / "tools", "--documents", tmp_path / "documents"]
    more += ["--chat-template", tmp_path / "own.jinja", "--chat-template-kwargs", '{"x": null}']
    assert generate(folder, "ab", "--chat", *more).exit_code == 0
    _, prompts, options = recorded[0]
    assert prompts == [[{"role": "system", "content": "be"}, {"role": "user", "content": "ab"}]]
    assert options["tools"] == [{"n": 1}] and options["documents"] == [{"text": "é"}]
    assert options["chat_template"] == "é{{ messages }}" and options["chat_template_kwargs"] == {"x": None}
    assert generate(folder, "ab", "--chat", "--chat-template", "rag").exit_code == 0
    assert recorded[1][2]["chat_template"] == "rag"


def test_only_the_answer_is_printed(chat_folder):
    lm = decodax.load(chat_folder)
    question = [{"role": "user", "content": "ab"}]
    expected = decodax.generate(lm, [question, [{"role": "user", "content": "cd"}]], max_new_tokens=5).text
    one = generate(chat_folder, "ab", "--chat", "--max-new-tokens", "5")
    assert one.exit_code == 0 and one.stdout == expected[0] + "\n"
    two = generate(chat_folder, "ab", "cd", "--chat", "--max-new-tokens", "5")
    assert two.stdout == f"ab\n{expected[0]}\n\ncd\n{expected[1]}\n"
    document = json.loads(generate(chat_folder, "ab", "--chat", "--max-new-tokens", "5", "--json").stdout)
    assert document["prompts"] == ["ab"] and document["text"] == expected[:1]
    assert set("".join(expected)) <= set(CHARACTERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "be"], "--system is for conversations: add --chat"),
        (["--tools", "x", "--chat-template", "y"], "--tools, --chat-template is for conversations: add --chat"),
        (["--chat", "--tools", "FILE"], "--tools must be a file with a list in JSON"),
        (["--chat", "--documents", "OBJECT"], "--documents must be a file with a list in JSON, and .* has another"),
        (["--chat", "--chat-template-kwargs", "{"], "--chat-template-kwargs must be JSON"),
        (["--chat", "--chat-template-kwargs", "[1]"], "--chat-template-kwargs must be JSON like"),
    ],
)
def test_wrong_options_are_usage_errors(folder, recorded, tmp_path, arguments, message):
    (tmp_path / "FILE").write_text("no json")
    (tmp_path / "OBJECT").write_text("{}")
    given = [tmp_path / text if text in ("FILE", "OBJECT") else text for text in arguments]
    result = generate(folder, "ab", *given)
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and recorded == []
    assert re.search(message, said), said


def test_failures_are_one_line(folder, chat_folder):
    for model, more, message in [
        (folder, [], "error: prompt 0: "),
        (chat_folder, ["--tools", "/nowhere.json"], "error: "),
        (chat_folder, ["--chat-template", "rag"], "error: prompt 0: chat_template must be a template of Jinja"),
        (chat_folder, ["--chat-template", "{{ raise_exception('no\nway') }}"], "error: prompt 0: the chat template"),
    ]:
        result = generate(model, "ab", "--chat", *more)
        assert result.exit_code == 1 and result.stderr.startswith(message) and result.stderr.count("\n") == 1


def test_the_help_names_chat():
    assert "--chat" in run("generate", "--help").output
