"""Chat templates give transformers' text on ten structures; wrong messages and templates are one clear line each."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from decodax.models.tokenizers.chat_template import read_messages, render_chat, select_template
from decodax.models.tokenizers.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "chat"
FACTS = json.loads((GOLDEN / "expected.json").read_text("utf-8"))
TEMPLATES = {path.stem: path.read_text("utf-8") for path in sorted(GOLDEN.glob("*.jinja"))}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
QUESTION = [{"role": "user", "content": "hi"}]


def outcome(case):
    return FACTS["outcomes"][FACTS["cases"][case]]


def with_bos():
    """A tokenizer of bytes that puts <s> before a text, as the one that made the golden file."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return Tokenizer(backend, chat_templates=TEMPLATES, named_tokens=TOKENS)


def test_there_are_ten_structures_and_all_their_cases():
    assert len(TEMPLATES) == 10
    cases = {
        f"{name}/{chat}/{kind}" for name in TEMPLATES for chat in FACTS["conversations"] for kind in FACTS["options"]
    }
    assert {case for case in FACTS["cases"] if not case.endswith("/ids")} == cases


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", FACTS["options"])
def test_texts_are_those_of_transformers(name, kind):
    for chat, messages in FACTS["conversations"].items():
        expected = outcome(f"{name}/{chat}/{kind}")
        options = dict(FACTS["options"][kind])
        named = {key: options.pop(key) for key in list(options) if key in ("tools", "documents")}
        named |= {key: options.pop(key) for key in list(options) if key.endswith(("prompt", "final_message"))}
        if isinstance(expected, dict):
            with pytest.raises(ValueError, match=r"the chat template (fails|refuses)|continue_final_message needs"):
                render_chat(TEMPLATES[name], messages, variables=TOKENS | options, **named)
        else:
            assert render_chat(TEMPLATES[name], messages, variables=TOKENS | options, **named) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers_with_one_start_token(name):
    """The template writes <s>, and the tokenizer would add another."""
    tokenizer = with_bos()
    for chat, messages in FACTS["conversations"].items():
        case = f"{name}/{chat}/prompted"
        if not isinstance(outcome(case), str):
            continue
        ids = tokenizer.encode_chat(messages, chat_template=name, add_generation_prompt=True)
        expected = outcome(f"{case}/ids")
        assert {"number": len(ids), "first": ids[:3], "last": ids[-3:]} == expected
        assert (ids[0] == 256) == outcome(case).startswith("<s>")


def test_a_text_that_begins_with_the_start_token_gets_no_second_one():
    tokenizer = with_bos()
    assert tokenizer.encode("<s>a") == tokenizer.encode("a") == [256, 64]
    assert tokenizer.encode("<s><s>a") == [256, 256, 64]  # its own
    assert tokenizer.encode("<s>") == tokenizer.encode("") == [256]
    assert tokenizer.encode("a<s>") == [256, 64, 256]
    bare = Tokenizer(tokenizer.backend, prefix=[256], suffix=[257])
    bare.backend.post_processor = None
    assert bare.encode("<s>a") == bare.encode("a") == [256, 64, 257]
    assert Tokenizer(bare.backend, suffix=[256]).encode("<s>") == [256, 256]  # one begins it, one ends it


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_s_beginning_is_rendered_to_the_beginning_of_its_text(name):
    """Where a template looks at no later message; a prompt cache can keep the ids of what came before."""
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Four"},
        {"role": "user", "content": "Five?"},
    ]
    texts = [render_chat(TEMPLATES[name], turns[:length], variables=TOKENS) for length in (1, 2, 3, 4, 5)]
    if name == "phi":  # which ends every text with the end token
        texts = [text.removesuffix("</s>") for text in texts]
    if name == "qwen":  # which writes the reasoning of the last answer only
        assert texts[1] == texts[0] + "<|im_start|>assistant\n\n<think>\n\n</think>\n\nTwo<|im_end|>\n"
        texts = texts[::2]
    for text, longer in itertools.pairwise(texts):
        assert longer.startswith(text) and longer != text


@pytest.mark.parametrize("name", ["reasoning", "thinking", "reasoning_content"])
def test_reasoning_is_there_under_the_names_that_templates_read(name):
    template = "{{ messages[0].thinking }}|{{ messages[0].reasoning_content }}"
    assert render_chat(template, [{"role": "assistant", name: "hm"}]) == "hm|hm"


def test_the_final_message_is_continued():
    messages = [*QUESTION, {"role": "assistant", "content": "So  "}]
    write = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert render_chat(write, messages, continue_final_message=True) == "[hi][So  "
    assert render_chat(write.replace("content", "content | trim"), messages, continue_final_message=True) == "[hi][So"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    both = "{% for p in messages[0].content %}({{ p.text }}){% endfor %}"
    assert render_chat(both, parts, continue_final_message=True) == "(a"
    assert messages[-1] == {"role": "assistant", "content": "So  "}  # the user's own is unchanged


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (
            QUESTION,
            {"add_generation_prompt": True},
            "and add_generation_prompt exclude each other",
        ),
        ([{"role": "user"}], {}, "continue_final_message needs a text in the last message, and it has none"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "needs a text in the last message"),
    ],
)
def test_a_final_message_that_cannot_be_continued(messages, options, message):
    with pytest.raises(ValueError, match=message):
        render_chat("{{ messages[0].content }}", messages, continue_final_message=True, **options)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, r"^messages must be a list of messages like \{\"role\": .*, got None$"),
        ({"role": "user", "content": "a"}, "^messages must be a list of messages"),
        ("hi", "^messages must be a list of messages"),
        (["hi"], "^messages must be a list of messages"),
        ([*QUESTION, "hi"], "^messages must be a list of messages"),
        ([], "^messages must hold at least one message, got none$"),
        ([{"content": "a"}], r"^messages\[0\] must be a mapping with a text as \"role\", got "),
        ([*QUESTION, {"role": 5, "content": "a"}], r"^messages\[1\] must be a mapping with a text as \"role\""),
        ([{"role": "user", "content": 5}], r"^\"content\" of messages\[0\] must be a text or a list of parts, got 5$"),
        ([{"role": "user", "content": {"text": "a"}}], "must be a text or a list of parts"),
        ([{"role": "user", "content": "a\udce9"}], r"^messages\[0\] must be text, and its character 1 is the lone"),
        ([{"role": "user", "content": [object()]}], r"^messages\[0\] must be made of texts, numbers, lists"),
        ([{"role": "user", "x": b"a"}], r"^messages\[0\] must be made of texts"),
        ([{"role": "user", 5: "a"}], r"^messages\[0\] must be made of texts"),
    ],
)
def test_wrong_messages_are_refused_by_name(messages, message):
    with pytest.raises(ValueError, match=message):
        read_messages("messages", messages)


def test_messages_are_plain_and_copies():
    deep = [{"role": "user", "content": "a", "x": {"n": np.int64(7), "f": np.float32(0.5), "l": (1, np.array([2, 3]))}}]
    assert read_messages("m", iter(deep)) == [
        {"role": "user", "content": "a", "x": {"n": 7, "f": 0.5, "l": [1, [2, 3]]}}
    ]
    loop = {"role": "user"}
    loop["x"] = loop
    with pytest.raises(ValueError, match=r"^m\[0\] must be nested at most 64 levels deep$"):
        read_messages("m", [loop])


def weather(place: str) -> str:
    return place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tools": [weather]},
            "tools must be a list of JSON schemas of functions, got .*; a function's schema has",
        ),
        ({"tools": "weather"}, "tools must be a list of JSON schemas"),
        ({"tools": {"type": "function"}}, "tools must be a list of JSON schemas"),
        ({"documents": ["text"]}, 'documents must be a list of mappings with "title" and "text"'),
        ({"variables": {"x": object()}}, "x must be made of texts"),
    ],
)
def test_wrong_tools_and_documents_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        render_chat("", QUESTION, **options)


def test_the_template_is_the_one_that_is_asked_for():
    several = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}", "rag": "{{ 3 }}"}
    assert select_template(several, None, False, "it") == "{{ 1 }}"
    assert select_template(several, None, True, "it") == "{{ 2 }}"
    assert select_template(several, "rag", True, "it") == "{{ 3 }}"
    assert select_template(several, "{{ 4 }}", True, "it") == "{{ 4 }}"
    assert select_template({}, "{{ 4 }}", False, "it") == "{{ 4 }}"
    assert select_template({"default": "{{ 1 }}"}, None, True, "it") == "{{ 1 }}"


@pytest.mark.parametrize(
    ("templates", "wanted", "message"),
    [
        ({}, None, r"^its/tokenizer\.json has no chat template \(chat_template\.jinja beside it, or "),
        ({"rag": "", "tool_use": ""}, None, "several chat templates and none .* is the default: pass .*rag, tool_use$"),
        (
            {"default": ""},
            "toll_use",
            r"must be a template of Jinja, or the name .* \(default\), got 'toll_use'$",
        ),
    ],
)
def test_a_template_that_is_missing_is_one_line(templates, wanted, message):
    with pytest.raises(ValueError, match=re.compile(message)):
        select_template(templates, wanted, False, "its/tokenizer.json")


def test_a_long_conversation_is_no_endless_one():
    messages = [{"role": role, "content": f"turn {index}"} for index in range(211) for role in ("user", "assistant")]
    for template in TEMPLATES.values():
        assert "turn 210" in render_chat(template, messages, variables=TOKENS)
