"""The safetensors files of a folder, mapped into memory: which tensors they hold, checked before anything is read.

One file or several with an index; pickled files are never opened. The library `safetensors` checks a file; the bytes
are then mapped here, because it gives NumPy neither the eight-bit floats nor a view without a copy.

Format: https://github.com/huggingface/safetensors (8 bytes header size, JSON header, then the data).
"""

import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open


@runtime_checkable
class Entry(Protocol):
    """What is known of a stored tensor before its numbers are read: its type of number in safetensors' words (BF16)."""

    @property
    def kind(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor of a file: `content` is its bytes in the file's `mapping`."""

    kind: str
    shape: tuple[int, ...]
    content: np.ndarray
    mapping: mmap.mmap

    def array(self, dtype: DTypeLike) -> np.ndarray:
        """The mapped numbers."""
        return self.content.view(dtype).reshape(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or those that its index names.

    Raises FileNotFoundError when there are none, or one is missing; ValueError for a malformed index.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {single.name} nor {index.name}{_advice(folder)}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} must be JSON with a weight_map of tensor names to files: {error!r}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index} names files that are not in {folder}: {', '.join(missing)}")
    return files


def _advice(folder: Path) -> str:
    if found := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)):
        return (
            f", only {', '.join(found)}: pickled files can run code and are not opened. Convert them once "
            "with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    if found := sorted(file.name for file in folder.glob("*.gguf")):
        return f", only {', '.join(found)}: GGUF is not read; use the model's safetensors files"
    if found := sorted(file.name for file in folder.glob("*.safetensors")):
        return f", only {', '.join(found)}: rename a single file to model.safetensors, or add the index of several"
    return ": the weights are expected in one of them"


def open_files(files: list[Path]) -> dict[str, RawTensor]:
    """Every tensor of the files by its name, in the order in which they are stored.

    Raises ValueError for a damaged file.
    """
    stored: dict[str, RawTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass  # the header and all sizes are in order
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is no intact safetensors file ({_sizes(file)}): {error}") from error
        with file.open("rb") as stream:
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        content = np.frombuffer(mapping, np.uint8)
        header_size = int(content[:8].view("<u8")[0])
        header: dict[str, Any] = json.loads(content[8 : 8 + header_size].tobytes())
        header.pop("__metadata__", None)
        content = content[8 + header_size :]
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            stored[name] = RawTensor(entry["dtype"], tuple(entry["shape"]), content[start:end], mapping)
    return stored


def mappings_of(stored: Mapping[str, Entry]) -> list[mmap.mmap]:
    """The mapped files in which these tensors stand."""
    mappings = (tensor.mapping for tensor in stored.values() if isinstance(tensor, RawTensor))
    return list({id(mapping): mapping for mapping in mappings}.values())


def forget_pages(mappings: Iterable[mmap.mmap]) -> None:
    """Gives back the memory of what has been read of mapped files so far; what is read again is mapped again.

    The kernel would do it only when memory runs short, and until then counts the pages as this process's.
    """
    if hasattr(mmap, "MADV_DONTNEED"):  # Windows has no such thing
        for mapping in mappings:
            mapping.madvise(mmap.MADV_DONTNEED)


def _sizes(file: Path) -> str:
    """What the file's own header says about its size, against its real size."""
    actual = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_size > actual - 8:
            return f"it has {actual} bytes, too few for its header: download or write it again"
        try:
            header = json.loads(stream.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + header_size + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return f"it has {actual} bytes and an unreadable header: download or write it again"
    return f"expected {expected} bytes, it has {actual}: download or write it again"
