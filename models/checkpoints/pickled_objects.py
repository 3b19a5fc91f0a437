"""Represents what the pickle of a PyTorch state dictionary names: storages, tensors and dictionaries, as data.

Every function that such a pickle calls has a counterpart here, which checks its arguments and returns a description;
every other name is refused.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from decodax.core.printable import printable

_STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.UntypedStorage": "U8",
    "torch.storage.UntypedStorage": "U8",
}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_DICTIONARY = "collections.OrderedDict"
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_NAMES = frozenset({_DICTIONARY, _TENSOR, _PARAMETER, *_STORAGES})
_MAX_AXES, _MAX_NUMBERS = 32, 2**62
_MAX_BITS = 64  # of a whole number
CONVERT = (
    "convert it once with transformers, AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder), which "
    "writes safetensors"
)


@dataclass(frozen=True)
class Storage:
    """A storage: the kind of its numbers, its key in the file, and how many there are."""

    kind: str
    key: str
    count: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor: number [i, j, ..] is storage[offset + i * strides[0] + j * strides[1] + ..]."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A name that the pickle may use."""

    text: str


def update(target: Any, items: list[Any]) -> None:
    """Adds keys and values, in turn, to a dictionary; ValueError if it is none or a key is no text."""
    if not isinstance(target, dict) or len(items) % 2 or not all(type(key) is str for key in items[::2]):
        raise ValueError(
            f"its pickle has an object with keys that are no texts, which no state dictionary has: {CONVERT}"
        )
    target.update(zip(items[::2], items[1::2], strict=True))


def allowed(argument: str) -> Name:
    """The name of a GLOBAL instruction: module and name with a space between them."""
    text = ".".join(argument.split(" ", 1))
    if text not in _NAMES:
        raise ValueError(
            f"its pickle names {printable(text)}, which could run code and is not used: only tensors and their "
            f"storages are read; if you trust the file, {CONVERT}"
        )
    return Name(text)


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMBERS


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= _MAX_AXES and all(map(_whole, value))


def short(value: int) -> int:
    """The number; ValueError if it has more than 64 bits."""
    if value.bit_length() > _MAX_BITS:
        raise ValueError("its pickle has a number of more than 64 bits, which no size has: download the file again")
    return value


def storage_of(described: Any) -> Storage:
    """("storage", class, key, device, count) as a storage."""
    if isinstance(described, tuple) and len(described) in (5, 6) and described[0] == "storage":
        kind, key, count = described[1], described[2], described[4]
        if isinstance(kind, Name) and kind.text in _STORAGES and type(key) is str and _whole(count):
            return Storage(_STORAGES[kind.text], key, count)
    raise ValueError("its pickle describes a storage in an unknown way: download the file again")


def _tensor(arguments: tuple[Any, ...]) -> PickledTensor:
    """(storage, offset, sizes, strides, ...) as a tensor within its storage."""
    if len(arguments) < 4:
        raise ValueError("its pickle describes a tensor in an unknown way: download the file again")
    storage, offset, sizes, strides = arguments[:4]
    is_known = isinstance(storage, Storage) and _whole(offset) and _are_sizes(sizes) and _are_sizes(strides)
    if not is_known or len(sizes) != len(strides):
        raise ValueError("its pickle describes a tensor in an unknown way: download the file again")
    count = math.prod(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if math.prod(size or 1 for size in sizes) > _MAX_NUMBERS or (count and last >= storage.count):
        raise ValueError(
            f"its pickle has a tensor {printable(list(sizes))} that ends after the {storage.count:,} numbers of its "
            f"storage {printable(storage.key)}: download the file again"
        )
    return PickledTensor(storage, offset, sizes, strides)


def _parameter(arguments: tuple[Any, ...]) -> PickledTensor:
    if not arguments or not isinstance(arguments[0], PickledTensor):
        raise ValueError("its pickle describes a parameter in an unknown way: download the file again")
    return arguments[0]


def _dictionary(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """An empty dictionary, or that of a list of pairs."""
    found: dict[str, Any] = {}
    pairs = arguments[0] if len(arguments) == 1 else []
    if len(arguments) > 1 or not isinstance(pairs, list):
        raise ValueError("its pickle describes a dictionary in an unknown way: download the file again")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("its pickle describes a dictionary in an unknown way: download the file again")
        update(found, list(pair))
    return found


FUNCTIONS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    _DICTIONARY: _dictionary,
    _TENSOR: _tensor,
    _PARAMETER: _parameter,
}
