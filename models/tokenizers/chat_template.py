"""Renders a conversation with a model's chat template, a program of Jinja, as transformers does.

What a template sees is plain: texts, numbers, lists and dictionaries. As in transformers 5, entries of a message that
are None are left out, and a message's reasoning is there under each of its three names.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from decodax.core.arguments import in_order, is_integer, is_number, plain, refusal, shown, text
from decodax.core.printable import printable, printable_list

DEFAULT, _TOOLS = "default", "tool_use"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_MAX_DEPTH = 64
_END = "END-OF-THE-MESSAGE-THAT-IS-CONTINUED"  # put into the message that is continued, to find its end in the text


def select_template(templates: Mapping[str, str], wanted: str | None, has_tools: bool, source: str) -> str:
    """The template for a conversation.

    templates: the model's own, by name.
    wanted: the name of one, or a template; None for the usual one.
    has_tools: whether the conversation has tools, for which some models have a template of its own.
    source: of the templates, for messages.
    Raises ValueError if there is none.
    """
    if wanted is not None:
        found = templates.get(text("chat_template", wanted))
        if found is None and "{" not in wanted:
            raise ValueError(
                f"chat_template must be a template of Jinja, or the name of one of the model's "
                f"({printable_list(templates, most=8) or 'which has none'}), got {shown(wanted)}"
            )
        return wanted if found is None else found
    for name in (_TOOLS, DEFAULT) if has_tools else (DEFAULT,):
        if name in templates:
            return templates[name]
    if templates:
        raise ValueError(
            f"{source} has several chat templates and none of them is the default: pass chat_template=, one of "
            f"{printable_list(templates, most=8)}"
        )
    raise ValueError(
        f"{source} has no chat template (chat_template.jinja beside it, or chat_template in tokenizer_config.json), "
        "which messages need: pass chat_template= (on the command line --chat-template), or a text instead of messages"
    )


def render_chat(
    template: str,
    messages: Any,
    *,
    tools: Any = None,
    documents: Any = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation.

    template: a program of Jinja.
    messages: mappings with "role" and "content".
    tools: JSON schemas of functions, or None.
    documents: mappings with "title" and "text", or None.
    add_generation_prompt: end with what begins the model's answer.
    continue_final_message: end within the last message.
    variables: further values for the template.
    Raises ValueError for messages, tools and documents of other forms, and for a template that refuses the messages, is
    wrong, does what the sandbox forbids, or does not end.
    """
    conversation = [_aliased(message) for message in read_messages("messages", messages)]
    final = ""
    if continue_final_message:
        if add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other: choose one")
        final = _mark_end(conversation[-1])
    given = {
        **{name: _plain(name, value) for name, value in (variables or {}).items()},
        "messages": conversation,
        "tools": _mappings("tools", tools, "JSON schemas of functions"),
        "documents": _mappings("documents", documents, 'mappings with "title" and "text"'),
        "add_generation_prompt": add_generation_prompt,
    }
    rendered = _run(template, given)
    return _until_mark(rendered, final) if continue_final_message else rendered


def read_messages(name: str, value: Any) -> list[dict[str, Any]]:
    """The messages of one conversation, checked and made plain.

    name: of the argument, for messages.
    value: what came.
    Raises ValueError for what is no list of messages.
    """
    messages = in_order(value)
    if messages is None or not all(isinstance(message, Mapping) for message in messages):
        raise refusal(name, 'a list of messages like {"role": "user", "content": "..."}', value)
    if not messages:
        raise ValueError(f"{name} must hold at least one message, got none")
    read = []
    for index, message in enumerate(messages):
        found = _plain(f"{name}[{index}]", message)
        if not isinstance(found.get("role"), str):
            raise refusal(f"{name}[{index}]", 'a mapping with a text as "role"', message)
        if not isinstance(found.get("content", ""), str | list | None):
            raise refusal(f'"content" of {name}[{index}]', "a text or a list of parts", found["content"])
        read.append({key: entry for key, entry in found.items() if entry is not None})
    return read


def _mappings(name: str, value: Any, expected: str) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    entries = in_order(value)
    if entries is None or not all(isinstance(entry, Mapping) for entry in entries):
        hint = "; a function's schema has its name, description and parameters" if _has_function(entries) else ""
        raise refusal(name, f"a list of {expected}", value, hint)
    return _plain(name, entries)


def _has_function(entries: list[Any] | None) -> bool:
    return any(isinstance(entry, Callable) for entry in entries or ())


def _plain(name: str, value: Any, depth: int = 0) -> Any:
    """A value as JSON has it, so that a template meets no methods of other objects."""
    value = plain(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(name, value)
    if is_number(value):
        return int(value) if is_integer(value) else float(value)
    if depth > _MAX_DEPTH:
        raise ValueError(f"{name} must be nested at most {_MAX_DEPTH} levels deep")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(name, entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(name, entry, depth + 1) for entry in value]
    raise refusal(name, "made of texts, numbers, lists and mappings with texts as keys (as JSON)", value)


def _aliased(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates read it by."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_end(message: dict[str, Any]) -> str:
    """Marks the end of a message's text, and returns the text."""
    content = message.get("content")
    parts = (
        [part for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if isinstance(content, list)
        else []
    )
    holder, key = (parts[-1], "text") if parts else (message, "content")
    if not isinstance(holder.get(key), str):
        raise ValueError("continue_final_message needs a text in the last message, and it has none")
    final = holder[key]
    holder[key] = final + _END + " "
    return final


def _until_mark(rendered: str, final: str) -> str:
    place = rendered.rfind(_END)
    if place < 0 or final.strip() not in rendered:
        raise ValueError(
            "continue_final_message needs a chat template that writes the last message as it is, and this one changes "
            "it: write the prompt as text instead"
        )
    is_stripped = not rendered.startswith(_END + " ", place)
    return rendered[:place].rstrip() if is_stripped else rendered[:place]


def _run(template: str, variables: dict[str, Any]) -> str:
    """Runs the template; whatever it raises is one ValueError."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError  # late: most prompts are texts

    from decodax.models.tokenizers.chat_limits import EndlessTemplateError
    from decodax.models.tokenizers.chat_sandbox import TemplateRefusal, run_template

    try:
        return run_template(template, variables)
    except TemplateRefusal as error:
        raise ValueError(f"the chat template refuses the messages: {printable(error)}") from error
    except EndlessTemplateError as error:
        raise ValueError(f"the chat template does not end: it takes {printable(error)}; pass another") from error
    except SecurityError as error:
        raise ValueError(f"the chat template does what is forbidden: {printable(error)}; pass another") from error
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is wrong in line {error.lineno}: {printable(error.message)}") from error
    except Exception as error:
        raise ValueError(
            f"the chat template fails on these messages: {printable(error) or type(error).__name__}"
        ) from error
