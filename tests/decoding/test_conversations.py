"""Prompts may be messages: one conversation or many, mixed ones refused; an answer that ends its turn stops."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import decodax
from decodax.decoding.options import GenerateOptions
from decodax.decoding.prompts import encode_prompts
from decodax.models.tokenizers.tokenizer import Tokenizer
from tests.decoding.test_generation import LETTERS, LM, ids
from tests.golden_files import load_golden

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content if m.content is string else m.content[0].text }}x{% endfor %}"
    "{% if tools %}t{{ tools[0].name }}{% endif %}{% if documents %}d{{ documents[0].text }}{% endif %}{{ extra }}"
    "{% if add_generation_prompt %}a {% endif %}"
)
TEMPLATES = {"default": TEMPLATE, "short": "{{ messages[0].role }}"}
CHAT = dataclasses.replace(LM, tokenizer=Tokenizer(LM.tokenizer.backend, chat_templates=TEMPLATES))
HELLO = [{"role": "user", "content": "hello"}]
TURNS = [{"role": "system", "content": "be"}, *HELLO, {"role": "assistant", "content": "yes"}]


def encoded(prompts, **options):
    return [row.tolist() for row in encode_prompts(CHAT, prompts, GenerateOptions(**options).chat_options)]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (HELLO, ["u helloxa "]),
        (tuple(HELLO), ["u helloxa "]),
        (iter(HELLO), ["u helloxa "]),
        ([HELLO], ["u helloxa "]),
        ([HELLO, TURNS], ["u helloxa ", "s bexu helloxa yesxa "]),
        ((TURNS, iter(HELLO)), ["s bexu helloxa yesxa ", "u helloxa "]),
        ([HELLO, "abc", ids("xy"), np.array(ids("z"))], ["u helloxa ", "abc", "xy", "z"]),
        (["abc", HELLO], ["abc", "u helloxa "]),
        ([ids("ab"), HELLO], ["ab", "u helloxa "]),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], ["u hixa "]),
        # Without a mapping in it, a list is what it was: ids, or many prompts.
        ([1, 2], [LETTERS[1] + LETTERS[2]]),
        ([[1, 2]], [LETTERS[1] + LETTERS[2]]),
        ([[1, 2], [3]], [LETTERS[1] + LETTERS[2], LETTERS[3]]),
        (jnp.array([[1, 2]]), [LETTERS[1] + LETTERS[2]]),
    ],
)
def test_every_form_of_prompts(prompts, expected):
    assert encoded(prompts) == [ids(text) for text in expected]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tools": [{"name": "w"}]}, "u helloxtwa "),
        ({"documents": [{"text": "q"}]}, "u helloxdqa "),
        ({"documents": iter([{"text": "q"}])}, "u helloxdqa "),
        ({"chat_template": "short"}, "user"),
        ({"chat_template": "{{ messages[0].content }}"}, "hello"),
        ({"chat_template_kwargs": {"extra": 7}}, "u hellox7a "),
        ({"continue_final_message": True}, "u hello"),
        ({"continue_final_message": np.bool_(True), "tools": [{"name": "w"}]}, "u hello"),
        ({"tools": [], "chat_template_kwargs": {}, "continue_final_message": False}, "u helloxa "),
    ],
)
def test_options_of_conversations(options, expected):
    assert encoded(HELLO, **options) == [ids(expected)]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (HELLO[0], "^prompts must be .*, got {'content': .*; a message alone is no prompt, a list of messages is$"),
        ([*HELLO, "abc"], "^prompt 0 mixes messages with 'abc': a conversation is a list of messages alone$"),
        ([*HELLO, ids("a")], r"^prompt 0 mixes messages with \[0\]"),
        ([*HELLO, HELLO], r"^prompt 0 mixes messages with \[{'content'"),
        ([HELLO, *HELLO], "^prompt 1 must be a text, a list of token ids or a list of messages, got {'content'"),
        (["abc", *HELLO], "^prompt 1 must be .*, got {'content'"),
        ([1, *HELLO], "^prompt 0 mixes messages with 1"),
        ([["a", HELLO[0]]], "^prompt 0 mixes messages with 'a'"),
        ([HELLO, [HELLO]], "^prompt 1 must be a text, a list of token ids or a list of messages"),
        ([[HELLO]], "^prompt 0 must be"),
        ([["abc"]], "^prompt 0 must be"),
        ([HELLO, []], "^prompt 1 is empty"),
        ([{"content": "a"}], r'^prompt 0: messages\[0\] must be a mapping with a text as "role"'),
        ([HELLO, [{"role": "user", "content": 5}]], r'^prompt 1: "content" of messages\[0\] must be'),
        ([{"role": "user", "content": []}], "^prompt 0: the chat template fails on these messages"),
    ],
)
def test_mixed_and_wrong_ones_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message) as error:
        encoded(prompts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", []),
        ("documents", [{}]),
        ("chat_template", "short"),
        ("chat_template_kwargs", {"a": 1}),
        ("continue_final_message", True),
    ],
)
def test_options_of_conversations_are_refused_without_one(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is for prompts that are messages, .* these are texts or token ids"):
        encoded(["abc", [1]], **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": 5}, "^chat_template must be text, got 5"),
        ({"chat_template": "shirt"}, r"chat_template must be .* one of the model's \(default, short\), got 'shirt'"),
        ({"chat_template_kwargs": ["a"]}, r"^chat_template_kwargs must be a mapping of names to values, or None, got "),
        ({"chat_template_kwargs": {5: 1}}, "^chat_template_kwargs must be a mapping of names"),
        ({"chat_template_kwargs": {"tools": []}}, "^chat_template_kwargs must not hold tools, which every template"),
        ({"chat_template_kwargs": {"a": object()}}, "^prompt 0: a must be made of texts"),
        ({"continue_final_message": "yes"}, "^continue_final_message must be True or False, got 'yes'"),
        ({"tools": [len]}, "^prompt 0: tools must be a list of JSON schemas of functions, got .*; a function's"),
        ({"documents": "text"}, "^prompt 0: documents must be a list of mappings"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        encoded(HELLO, **options)


def test_a_model_without_a_template_or_a_tokenizer_says_what_to_do():
    with pytest.raises(ValueError, match=r"^prompt 0: the tokenizer has no chat template .* pass chat_template="):
        encode_prompts(LM, HELLO)
    assert encode_prompts(LM, HELLO, {"chat_template": "{{ messages[0].content }}"})[0].tolist() == ids("hello")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json: pass token ids instead of text"):
        encode_prompts(dataclasses.replace(LM, tokenizer=None), HELLO)


def test_generation_from_messages_is_generation_from_their_text():
    tools = [{"name": "w"}]
    text = CHAT.tokenizer.apply_chat_template(TURNS, tools=tools, add_generation_prompt=True)
    assert text.endswith("twa ")
    out = decodax.generate(CHAT, [TURNS, HELLO], tools=tools, max_new_tokens=7)
    same = decodax.generate(CHAT, [text, "u helloxtwa "], max_new_tokens=7)
    assert [row.tolist() for row in out.tokens] == [row.tolist() for row in same.tokens]
    assert out.text == same.text


def test_an_answer_stops_where_its_turn_ends(tmp_path):
    """At an end token of generation_config.json that is not the model's eos_token, and that the text does not show."""
    golden = load_golden("llama")
    folder = tmp_path / "chat"
    shutil.copytree(golden.folder, folder)
    prompt, answer = golden.tokens[0, : golden.length[0]].tolist(), golden.generated[0].tolist()
    last = next(place for place in range(3, 24) if answer[place] not in answer[:place])
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = {f"w{token}": token for token in range(vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([f"w{answer[last]}"])
    backend.save(str(folder / "tokenizer.json"))
    unused = next(token for token in range(vocab_size) if token not in answer)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [unused, answer[last]]}))
    (folder / "chat_template.jinja").write_text("{{ messages | map(attribute='content') | join(' ') }}")
    lm = decodax.load(folder)
    messages = [{"role": "user", "content": " ".join(f"w{token}" for token in prompt)}]
    out = decodax.generate(lm, messages, max_new_tokens=23)
    assert out.finish_reasons == ["stop"] and out.tokens[0].tolist() == answer[: last + 1]
    assert out.text is not None and out.text[0].split() == [f"w{token}" for token in answer[:last]]


def test_a_tokenizer_of_another_model_is_refused_when_loaded(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(load_golden("llama").folder, folder)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    for number in (size, size + 1):
        words = {f"w{token}": token for token in range(number)}
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words)).save(str(folder / "tokenizer.json"))
        if number == size:
            assert decodax.load(folder).tokenizer.vocab_size == size
    with pytest.raises(ValueError, match=rf"has {size + 1} tokens, but the model's vocabulary has {size} "):
        decodax.load(folder)
