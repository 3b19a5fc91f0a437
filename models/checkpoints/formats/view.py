"""Presents the tensors of a checkpoint's files with packed weights under their own names and shapes.

`quantization_of` reads which weight format the config names, `readable` makes the view.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from decodax.core.printable import printable
from decodax.models.checkpoints.formats import FORMATS
from decodax.models.checkpoints.formats.contract import Format, PackedTensor, Pieces, Unreadable
from decodax.models.checkpoints.safetensors_files import PLAIN_DTYPES, Entry

_MLX = "mlx"  # names no quant_method


@dataclass(frozen=True)
class Quantization:
    """The weight format that a config names.

    method: a name of FORMATS.
    settings: what the format has read from the config's fields.
    """

    method: str
    settings: Any


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """The weight format in the fields of a `config.json`; None for plain weights.

    It is in `quantization_config`, MLX's in `quantization` or in both.
    Raises ValueError for a method, or details of one, that are not supported.
    """
    field, others = config.get("quantization_config"), config.get("quantization")
    if others is not None:
        if field not in (None, others):
            raise ValueError(
                "quantization (of MLX) and quantization_config must be equal where a config.json has both: "
                "remove the one that is not of its weights"
            )
        if not _is_mlx(others):
            raise ValueError(
                "quantization must be null or absent, or have group_size and bits as MLX writes it, got "
                f"{printable(repr(others))}"
            )
        return Quantization(_MLX, FORMATS[_MLX].settings(others))
    if field is None:
        return None
    method = field.get("quant_method") if isinstance(field, Mapping) else None
    if method is None and _is_mlx(field):
        method = _MLX
    if not isinstance(method, str) or method not in FORMATS:
        raise ValueError(
            f"quantization_config must be null or absent, or have a quant_method of {', '.join(FORMATS)}, got "
            f"{printable(repr(field))}: use a checkpoint with plain (float) weights"
        )
    return Quantization(method, FORMATS[method].settings(field))


def _is_mlx(field: Any) -> bool:
    return isinstance(field, Mapping) and {"group_size", "bits"} <= field.keys() and "quant_method" not in field


def readable(stored: Mapping[str, Entry], quantization: Quantization | None) -> Mapping[str, Entry]:
    """The tensors of a checkpoint as a reader sees them, in the order of the files.

    Each is a `StoredTensor`, or `Unreadable` with the reason. Pieces of packed tensors are no longer there.

    stored: the tensors of the files.
    quantization: the weight format that the config names.
    """
    entries: dict[str, tuple[str, Entry]] = {}  # of the first piece -> the tensor's own name, and the tensor
    consumed: set[str] = set()

    def replace(piece: str, name: str, prefix: str, format: Format, entry: Entry) -> None:
        entries[piece] = (name, entry)
        consumed.update(prefix + suffix for suffix in format.suffixes)
        consumed.add(name)

    if quantization is not None:
        format = FORMATS[quantization.method]
        for piece in stored:
            if piece not in consumed and (found := format.packed_as(piece, stored)) is not None:
                replace(piece, *found, format, _packed(piece, *found, stored, format, quantization.settings))
    for piece, tensor in stored.items():
        if piece not in consumed and tensor.kind not in PLAIN_DTYPES and (methods := _methods(piece, stored)):
            named, (name, prefix) = " or ".join(methods), next(iter(methods.values()))
            problem = (
                f"not in config.json: {printable(name)} is stored as {named}, but there is no quantization_config with "
                f"quant_method {named}; copy it from where the checkpoint comes from"
            )
            entry = _unreadable(tensor, problem, is_packed=True)
            replace(piece, name, prefix, FORMATS[next(iter(methods))], entry)
    for piece, tensor in stored.items():
        if piece not in consumed and tensor.kind not in PLAIN_DTYPES:
            problem = (
                f"unknown kind of number: {printable(piece)} is {printable(tensor.kind)}, expected one of "
                f"{sorted(PLAIN_DTYPES)}, or a weight format that config.json names"
            )
            entries[piece] = (piece, _unreadable(tensor, problem, is_packed=False))
    return {
        name: entry
        for piece, tensor in stored.items()
        if piece in entries or piece not in consumed
        for name, entry in [entries.get(piece, (piece, tensor))]
    }


def is_packed(tensor: Entry) -> bool:
    """Whether a tensor is stored in a weight format, be it readable or not."""
    return tensor.is_packed if isinstance(tensor, Unreadable) else isinstance(tensor, PackedTensor)


def _packed(piece: str, name: str, prefix: str, stored: Mapping[str, Entry], format: Format, settings: Any) -> Entry:
    """The packed tensor of which `piece` is the first piece found, or why it cannot be read."""
    try:
        if name != piece and name in stored:
            raise ValueError(
                f"surplus: {printable(name)} is stored as it is and, as {printable(piece)}, packed: keep one of the two"
            )
        return format.tensor(Pieces(name, prefix, stored), settings)
    except ValueError as error:
        return _unreadable(stored[piece], str(error), is_packed=True)


def _unreadable(tensor: Entry, problem: str, *, is_packed: bool) -> Unreadable:
    return Unreadable(tensor.kind, tensor.shape, tensor.mappings, problem, is_packed)


def _methods(piece: str, stored: Mapping[str, Entry]) -> dict[str, tuple[str, str]]:
    """The formats of which most pieces are there, each with the tensor's name and the prefix of its pieces."""
    found = {method: named for method, format in FORMATS.items() if (named := format.packed_as(piece, stored))}
    counts = {
        method: sum(prefix + suffix in stored for suffix in FORMATS[method].suffixes)
        for method, (_, prefix) in found.items()
    }
    most = max(counts.values(), default=0)
    if most == 1 and stored[piece].kind in ("I8", "U8") and found.keys() <= {"bitsandbytes", "compressed-tensors"}:
        return {}  # whole numbers alone, which any program may have stored
    return {method: named for method, named in found.items() if counts[method] == most}
