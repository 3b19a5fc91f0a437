"""Reads the text to train on, from files and from all text files in folders."""

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from decodax.models.tokenizers.tokenizer import Tokenizer


def read_texts(paths: Iterable[Path]) -> list[str]:
    """The text of each file, in the order given; a folder gives its files by name, subfolders included.

    Hidden files and folders are skipped, and in folders all files that are empty or not text in UTF-8 (one warning
    says how many).
    Raises FileNotFoundError for a path that does not exist.
    Raises ValueError for a named file that is not such text, and when nothing is found at all.
    """
    texts, skipped = [], 0
    for path in paths:
        if path.is_dir():
            for file in _files(path):
                text = _text(file)
                skipped += text is None
                texts += [text] if text else []
        elif not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}")
        elif (text := _text(path)) is None:
            raise ValueError(f"{path} must be text in UTF-8")
        else:
            texts.append(text)
    if skipped:
        warnings.warn(f"{skipped} files are not text in UTF-8 and were skipped", stacklevel=2)
    if not any(texts):
        raise ValueError("the files hold no text: give some to train on")
    return texts


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[np.ndarray]:
    """Token ids of each text, with the start tokens that the model was trained with."""
    return [np.asarray(tokenizer.encode(text), np.int32) for text in texts]


def _files(folder: Path) -> Iterator[Path]:
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))


def _text(file: Path) -> str | None:
    """The file's text; None when it is not UTF-8, or holds a zero byte, which text does not."""
    content = file.read_bytes()
    try:
        return None if b"\0" in content else content.decode("utf-8")
    except UnicodeDecodeError:
        return None
