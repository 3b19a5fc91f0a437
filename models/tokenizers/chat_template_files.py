"""Reads the chat templates of a model folder, in the order in which transformers looks for them.

`chat_template.jinja` and `additional_chat_templates/*.jinja` count if one of them is there, else `chat_template` of
`tokenizer_config.json`: one template, or a list of several with their names.
"""

from pathlib import Path
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.model_files import find_file
from decodax.models.tokenizers.added_tokens import read_settings
from decodax.models.tokenizers.chat_template import DEFAULT

_FILE, ADDITIONAL, _CONFIG = "chat_template.jinja", "additional_chat_templates", "tokenizer_config.json"
_SUFFIX = ".jinja"
_MAX_BYTES = 2**20  # the largest published templates have some 20,000


def read_chat_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a folder by name, "default" the usual one; none if the folder has none.

    Raises ValueError, naming the file, for one that is no text or absurdly large.
    """
    further = folder / ADDITIONAL
    names = sorted(path.name for path in further.iterdir()) if further.is_dir() else []
    files = {DEFAULT: _FILE} | {
        name.removesuffix(_SUFFIX): f"{ADDITIONAL}/{name}" for name in names if name.endswith(_SUFFIX)
    }
    found = {name: find_file(folder, file) for name, file in files.items()}
    templates = {name: _read(path) for name, path in found.items() if path is not None}
    return templates or _in_config(read_settings(folder, _CONFIG).get("chat_template"), folder / _CONFIG)


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ValueError(f"{printable(path)} has {size:,} bytes; a template of more than {_MAX_BYTES:,} is not read")
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path)} must be text in UTF-8: {error}") from error


def _in_config(value: Any, path: Path) -> dict[str, str]:
    entries = [{"name": DEFAULT, "template": value}] if isinstance(value, str) else value or []
    is_read = isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in entries
    )
    if not is_read:
        raise ValueError(
            f"chat_template in {printable(path)} must be a text, or a list of objects with name and template"
        )
    return {entry["name"]: entry["template"] for entry in entries}
