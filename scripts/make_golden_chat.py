"""Writes what transformers makes of conversations with ten chat templates (tests/golden/chat).

    python scripts/make_golden_chat.py

The templates are the project's own, of the structures that published ones have. Run it where transformers is installed.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "golden" / "chat"
BOS, EOS = "<s>", "</s>"

_SYSTEM = {"role": "system", "content": "Sei kurz & höflich <b>!"}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather of a "place", today & later',
            "parameters": {"type": "object", "properties": {"ort": {"type": "string", "enum": ["Köln", "東京"]}}},
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
]
_CALL = {"id": "abc123456", "type": "function", "function": {"name": "weather", "arguments": {"ort": "Köln", "b": 1}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "  What is 17 * 3? \n"}],
    "system": [_SYSTEM, {"role": "user", "content": "Hi <s> there"}],
    "turns": [
        _SYSTEM,
        {"role": "user", "content": "नमस्ते"},
        {"role": "assistant", "content": " Hello 👩‍👩‍👧! "},
        {"role": "user", "content": "And\nnow?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nNow."},
        {"role": "user", "content": "Thanks"},
    ],
    "answered": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two", "reasoning": "1 + 1"}],
    "none": [{"role": "user", "content": "One?", "name": None}, {"role": "assistant", "content": "Two "}],
    "tools": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "content": "17 °C", "name": "weather", "tool_call_id": "abc123456"},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "Warm."},
        {"role": "user", "content": "Good"},
    ],
    "parts": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Look "}, {"type": "image"}, {"type": "text", "text": "!"}],
        }
    ],
    "wrong order": [{"role": "assistant", "content": "I begin"}, {"role": "assistant", "content": "and go on"}],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prompted": {"add_generation_prompt": True},
    "tools": {"add_generation_prompt": True, "tools": _TOOLS},
    "documents": {
        "add_generation_prompt": True,
        "documents": [{"title": "Tall", "text": "The tower\nis " + "very " * 20 + "tall"}, {"title": "B", "text": "x"}],
    },
    "variables": {
        "add_generation_prompt": True,
        "enable_thinking": False,
        "thinking": True,
        "controls": {"length": "short"},
        "date_string": "2 Feb 2026",
    },
    "continued": {"continue_final_message": True},
}


def main() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, add_bos_token=True, add_prefix_space=False
    )
    expected: dict[str, Any] = {}
    for path in sorted(FOLDER.glob("*.jinja")):
        template = path.read_text("utf-8")
        for (name, messages), (kind, options) in product(CONVERSATIONS.items(), OPTIONS.items()):
            case = f"{path.stem}/{name}/{kind}"
            try:
                expected[case] = tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, **options
                )
            except Exception as error:
                expected[case] = {"error": type(error).__name__}
                continue
            if kind == "prompted":
                ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False, **options)
                expected[f"{case}/ids"] = {"number": len(ids), "first": ids[:3], "last": ids[-3:]}
    outcomes = [json.dumps(outcome, ensure_ascii=False) for outcome in expected.values()]
    unique = list(dict.fromkeys(outcomes))  # most options change few of the texts
    facts = {
        "conversations": CONVERSATIONS,
        "options": OPTIONS,
        "outcomes": [json.loads(outcome) for outcome in unique],
        "cases": dict(zip(expected, map(unique.index, outcomes), strict=True)),
    }
    (FOLDER / "expected.json").write_text(json.dumps(facts, ensure_ascii=False, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    main()
