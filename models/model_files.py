"""Finds and reads the small files of a model folder: only regular files, only inside the folder, only sane JSON.

A folder may come from anywhere, so nothing in it is trusted: a link must not lead out of it, a file must not be a pipe,
and what a file says reaches the terminal without its control characters.
"""

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**28  # the index of a model with a million tensors has a third of it
MAX_JSON_DEPTH = 64  # no config of a known model has ten levels; Python's own limit of recursion is near 1,000
_MAX_NAME_LENGTH = 200
_HUB_SNAPSHOTS, _HUB_REPOSITORY = "snapshots", "models--"  # <hub cache>/models--org--name/snapshots/<revision>/file


def find_file(folder: Path, name: str) -> Path | None:
    """The regular file `name` of a model folder; None when there is nothing of that name.

    Raises ValueError for a link that leads nowhere or out of the model's folder (a snapshot in the Hugging Face hub's
    cache may link to the blobs of its repository), and for what is neither a file nor a link to one (a pipe, a device).
    """
    path = folder / name
    if not path.is_symlink() and not path.exists():
        return None
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{printable(path)} is a link to {printable(_link_target(path))}, which is not there: download or copy the "
            "folder again, with the files that its links name"
        ) from error
    roots = _allowed_roots(folder)
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(
            f"{printable(path)} is a link to {printable(target)}, outside the model's folder: links out of a model "
            "folder are not followed; copy the file there, or pass the folder that holds it"
        )
    if not target.is_file():
        raise ValueError(f"{printable(path)} must be a regular file")
    return path


def _link_target(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return "itself"


def _allowed_roots(folder: Path) -> list[Path]:
    """Where the files of a model folder may lie: in it, and, for a snapshot of the hub's cache, in its repository."""
    resolved = folder.resolve()
    repository = resolved.parent.parent
    is_snapshot = resolved.parent.name == _HUB_SNAPSHOTS and repository.name.startswith(_HUB_REPOSITORY)
    return [resolved, repository] if is_snapshot else [resolved]


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError, naming the file, when it holds none or an absurd one."""
    return parse_json_object(read_json_bytes(path), str(path))


def read_json_bytes(path: Path) -> bytes:
    """The bytes of a JSON file, for one that another library reads, too; ValueError when there are absurdly many."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{printable(path)} has {size:,} bytes; JSON of more than {MAX_JSON_BYTES:,} is not read")
    return path.read_bytes()


def parse_json_object(content: bytes | bytearray | memoryview, where: str) -> dict[str, Any]:
    """The JSON object in these bytes; ValueError, naming `where` they come from, when they hold none."""
    try:
        value = json.loads(bytes(content).decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{printable(where)} is JSON nested deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"{printable(where)} is no valid JSON: {printable(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{printable(where)} must hold a JSON object, got a {type(value).__name__}")
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise ValueError(f"{printable(where)} is JSON nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects stand in one another more than `limit` times; without recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def printable(text: object) -> str:
    r"""What an error message may quote of a file: control characters escaped, and at most 200 characters.

    >>> printable("lm_head\x1b[2J")
    'lm_head\\x1b[2J'
    """
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in str(text)[: _MAX_NAME_LENGTH + 1]
    )
    return escaped if len(escaped) <= _MAX_NAME_LENGTH else escaped[: _MAX_NAME_LENGTH - 3] + "..."
