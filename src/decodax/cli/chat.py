"""Makes conversations of the command line's texts, and reads what a chat template is given with them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Chat = Annotated[
    bool,
    typer.Option("--chat", help="Ask each prompt as a question: the model's chat template writes it, and it answers."),
]
System = Annotated[str | None, typer.Option(help="With --chat: what the model is told before the question.")]
Tools = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="With --chat: a JSON file with a list of schemas of functions it may call."),
]
Documents = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="With --chat: a JSON file with a list of documents, each with title and text."),
]
Template = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="With --chat: one of the model's templates, or a file with another."),
]
TemplateValues = Annotated[
    str | None,
    typer.Option(metavar="JSON", help='With --chat: values that the template reads, like {"enable_thinking": false}.'),
]

Message = dict[str, str]


def conversations(texts: list[str], system: str | None) -> list[list[Message]]:
    """A conversation for each text, which is the user's message."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [[*before, {"role": "user", "content": text}] for text in texts]


def read_options(
    chat: bool,
    system: str | None,
    tools: str | None,
    documents: str | None,
    chat_template: str | None,
    chat_template_kwargs: str | None,
) -> dict[str, Any]:
    """The options of conversations, as `decodax.generate` takes them.

    Raises BadParameter for files and texts that are no JSON of the right form, and for options without --chat.
    """
    given = {"--system": system, "--tools": tools, "--documents": documents, "--chat-template": chat_template}
    given["--chat-template-kwargs"] = chat_template_kwargs
    idle = [name for name, value in given.items() if value is not None]
    if idle and not chat:
        raise typer.BadParameter(f"{', '.join(idle)} is for conversations: add --chat")
    options: dict[str, Any] = {"tools": _list_in("--tools", tools), "documents": _list_in("--documents", documents)}
    options["chat_template"] = chat_template if chat_template is None else _template(chat_template)
    options["chat_template_kwargs"] = None if chat_template_kwargs is None else _values(chat_template_kwargs)
    return options


def _template(name: str) -> str:
    path = Path(name)
    return path.read_text("utf-8") if path.is_file() else name


def _list_in(option: str, file: str | None) -> list[Any] | None:
    if file is None:
        return None
    try:
        value = json.loads(Path(file).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{option} must be a file with a list in JSON: {file}: {error}") from error
    if not isinstance(value, list):
        raise typer.BadParameter(f"{option} must be a file with a list in JSON, and {file} has another value")
    return value


def _values(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"--chat-template-kwargs must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f'--chat-template-kwargs must be JSON like {{"name": value}}, got {text}')
    return value
