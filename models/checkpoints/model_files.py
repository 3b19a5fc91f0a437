"""Finds and reads the small files of a model folder: only regular files inside the folder, only JSON of sane size.

A folder may come from anywhere, so nothing in it is trusted: a link must not lead out of it, a file must not be a pipe,
and text of a file is printed without its control characters.
"""

import errno
import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from decodax.core.printable import printable

MAX_JSON_BYTES = 2**28  # the index of a model with a million tensors has a third of it
MAX_JSON_DEPTH = 64  # no config of a known model has ten levels; Python's own limit of recursion is near 1,000
_MAX_DIGITS = 1_000  # of a whole number; one that a field can hold has ten
ORBAX_METADATA = "params/_METADATA"
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # no file can have so long a name
_HUB_SNAPSHOTS, _HUB_REPOSITORY = "snapshots", "models--"  # <hub cache>/models--org--name/snapshots/<revision>/file


class UnreasonableFileError(ValueError):
    """A file is not just damaged: no program that saves models writes its like, and reading it would exhaust memory."""


def find_file(folder: Path, name: str) -> Path | None:
    """The regular file `name` of a model folder; None if nothing has that name.

    In the Hugging Face hub's cache a snapshot may link to the blobs of its repository, and another folder may link into
    the cache, as downloads into a local folder once did.
    Raises ValueError for a link that leads nowhere or out of the model's folder, and for what is neither a file nor a
    link to one (a pipe, a device).
    """
    path = folder / name
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{printable(path)} is a link to {printable(_link_target(path))}, which is not there: download or copy the "
            "folder again, with the files that its links name"
        ) from error
    if not _is_allowed(folder, target):
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


def _is_allowed(folder: Path, target: Path) -> bool:
    """Whether a file of a model folder may be there."""
    resolved = folder.resolve()
    if target.is_relative_to(resolved) or folder.absolute().is_relative_to(_embedded()):
        return True
    repository = _hub_repository(resolved)
    if repository is not None:
        return target.is_relative_to(repository)
    from huggingface_hub import constants  # late: it is slow to import, and hardly ever asked

    return target.is_relative_to(Path(constants.HF_HUB_CACHE).expanduser().resolve())


def _embedded() -> Path:
    """The folder of decodax's demo model, which some package managers install as links into a store."""
    return Path(__file__).absolute().parent / "demo"


def _hub_repository(folder: Path) -> Path | None:
    """The hub-cache repository of which a folder is a snapshot, or is in one; None for any other folder."""
    for snapshots in folder.parents:
        if snapshots.name == _HUB_SNAPSHOTS and snapshots.parent.name.startswith(_HUB_REPOSITORY):
            return snapshots.parent
    return None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises ValueError, naming the file, if it holds none; UnreasonableFileError for one of absurd size.
    """
    return parse_json_object(read_json_bytes(path), str(path))


def read_json_bytes(path: Path) -> bytes:
    """The bytes of a JSON file that another library reads, too.

    Raises UnreasonableFileError for more than MAX_JSON_BYTES.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise UnreasonableFileError(
            f"{printable(path)} has {size:,} bytes; JSON of more than {MAX_JSON_BYTES:,} is not read"
        )
    return path.read_bytes()


def parse_json_object(content: bytes | bytearray | memoryview, where: str, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in these bytes.

    where: the bytes' origin, for messages.
    unique: refuse an object that has a name twice, of which Python would take the last.
    Raises ValueError if the bytes hold no JSON object.
    """
    try:
        text = bytes(content).decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique if unique else None, parse_int=_whole_number)
    except RecursionError:
        raise UnreasonableFileError(f"{printable(where)} is JSON nested deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"{printable(where)} is no valid JSON: {printable(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{printable(where)} must hold a JSON object, got {json_type(value)}")
    if _is_deeper(value, MAX_JSON_DEPTH):
        raise UnreasonableFileError(f"{printable(where)} is JSON nested deeper than {MAX_JSON_DEPTH} levels")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        raise ValueError(f"it has {next(name for name, _ in pairs if name in seen or seen.add(name))} twice")
    return content


def _whole_number(digits: str) -> int:
    """Reads an integer; Python refuses more digits with a message about a setting of the interpreter."""
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"it has a number of {len(digits):,} digits, {printable(digits[:10])}...")
    return int(digits)


def json_type(value: object) -> str:
    """JSON's name for the type of a value, for an error message.

    >>> json_type(None), json_type([1]), json_type(0.5)
    ('null', 'a list', 'a number')
    """
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else kinds[type(value)]


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` levels deep; without recursion."""
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


def has_orbax_arrays(folder: Path) -> bool:
    """Whether a model's weights are an Orbax checkpoint (`models/checkpoints/orbax_arrays.py`)."""
    return find_file(folder, ORBAX_METADATA) is not None


def stamp(folder: str | os.PathLike[str]) -> Hashable:
    """What tells whether a file or those of a folder have changed: names, sizes and times; None if there are none."""
    try:
        path = Path(folder).expanduser()
        entries = [path] if path.is_file() else os.scandir(path)
        found = ((entry.name, entry.stat()) for entry in entries if entry.is_file())
        return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found))
    except (OSError, ValueError, RuntimeError):  # no folder; a name that no file has; an unknown home
        return None
