"""Merges one LoRA adapter into the stored tensors that fill a model's parameters."""

import warnings
from collections.abc import Mapping

import numpy as np

from decodax.core.printable import printable, printable_list
from decodax.models.checkpoints.adapters.files import Adapter, LowRank
from decodax.models.checkpoints.adapters.merged_tensor import MergedTensor
from decodax.models.checkpoints.formats.contract import Unreadable
from decodax.models.checkpoints.name_map import NameMaps, TensorSlice
from decodax.models.checkpoints.name_map_selection import Match
from decodax.models.checkpoints.name_prefix import TensorNames
from decodax.models.checkpoints.safetensors_files import Entry
from decodax.models.checkpoints.weight_formats import StoredTensor
from decodax.models.families.contract import ParameterPath

_WEIGHT = ".weight"


def merged_tensors(
    adapter: Adapter,
    names: TensorNames,
    match: Match,
    name_maps: Mapping[ParameterPath, NameMaps],
    stored: Mapping[str, Entry],
) -> dict[str, StoredTensor]:
    """The tensors of a match, by their names in the files, with the adapter's changes.

    names: the prefixes of the adapter's names.
    match: of the model.
    name_maps: of the model's parameters, with the names that the model expects.
    stored: all tensors of the model's files.
    Raises ValueError for a tensor of the adapter that does not fit the model.
    Warns of modules that the adapter should change but has no matrices for.
    """
    slices = {one.name: one for name_map in match.nearest.values() for one in name_map}
    tensors = dict(match.tensors)
    for own, tensor in adapter.whole.items():
        name = match.names.in_file(names.expected(own))
        if name not in tensors:
            raise _unknown(adapter, own, tensor.shape, stored.get(name))
        if tensor.shape != tensors[name].shape:
            raise _mismatch(adapter, f"{printable(own)} {list(tensor.shape)}", tensors[name])
        tensors[name] = tensor
    for own, matrices in adapter.low_rank.items():
        expected = names.expected(own)
        name = match.names.in_file(expected)
        if name in tensors:
            left, right = matrices.ups(), matrices.downs()
            if matrices.is_embedding or slices[name].transposed:
                left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
            tensors[name] = _sum(adapter, own, matrices, tensors[name], left, right)
            continue
        parts = _parts(expected, match, name_maps)
        if not parts:
            raise _unknown(adapter, own, matrices.shape, stored.get(name))
        for path, fused in parts.items():
            _add_to_experts(adapter, own, matrices, fused, match.nearest[path], tensors)
    single = {name for name, one in slices.items() if one.at is None and name in tensors}
    _warn_of_unchanged(adapter, {names.in_file(match.names.expected(name)): tensors[name] for name in single})
    return tensors


def _parts(name: str, match: Match, name_maps: Mapping[ParameterPath, NameMaps]) -> dict[ParameterPath, TensorSlice]:
    """The parameters that a tensor of experts would fill if the files had it, and the slice that each takes of it.

    The files have one matrix per expert.
    """
    return {
        path: name_map[0]
        for path, several in name_maps.items()
        for name_map in several
        if name_map[0].name == name and path in match.nearest and all(one.at is not None for one in match.nearest[path])
    }


def _add_to_experts(
    adapter: Adapter,
    own: str,
    matrices: LowRank,
    fused: TensorSlice,
    experts: tuple[TensorSlice, ...],
    tensors: dict[str, StoredTensor],
) -> None:
    """Adds the change of a stack of experts to the tensors of its experts."""
    ups, downs = matrices.ups(), matrices.downs()
    if len(ups) != len(experts):
        raise ValueError(
            f"the adapter in {printable(adapter.folder)} has matrices for {len(ups)} experts of {printable(own)}, and "
            f"the model has {len(experts)}: {adapter.origin}"
        )
    for expert in experts:
        up, down = ups[expert.at], downs[expert.at]
        if fused.part is not None:
            count = len(up) // fused.part.period * fused.part.width
            up = up[fused.part.indices(0, count)]
        tensors[expert.name] = _sum(adapter, own, matrices, tensors[expert.name], up[None], down[None])


def _unknown(adapter: Adapter, own: str, shape: tuple[int, ...], stored: Entry | None) -> ValueError:
    """The error for a tensor that the model does not have, or has but does not use."""
    is_stored = stored is not None and not isinstance(stored, Unreadable)
    reason = "which decodax does not use" if is_stored else "which the model does not have"
    return ValueError(
        f"the adapter in {printable(adapter.folder)} changes {printable(own)} {list(shape)}, {reason}: {adapter.origin}"
    )


def _mismatch(adapter: Adapter, what: str, base: StoredTensor) -> ValueError:
    return ValueError(
        f"the adapter in {printable(adapter.folder)} has {what}, and the model's {base.label} is {list(base.shape)}: "
        f"{adapter.origin}"
    )


def _sum(
    adapter: Adapter, own: str, matrices: LowRank, base: StoredTensor, left: np.ndarray, right: np.ndarray
) -> MergedTensor:
    shape = (*left.shape[:-1], right.shape[-1])
    if base.shape not in (shape, shape[1:] if len(left) == 1 else shape):
        what = f"matrices for {printable(own)} {list(shape[1:] if len(left) == 1 else shape)}"
        raise _mismatch(adapter, what, base)
    mappings = {id(one): one for tensor in (base, matrices.up, matrices.down) for one in tensor.mappings}
    label = f"{base.label} with the adapter in {printable(adapter.folder)}"
    return MergedTensor(base, left, right, matrices.scale, label, tuple(mappings.values()))


def _warn_of_unchanged(adapter: Adapter, tensors: Mapping[str, StoredTensor]) -> None:
    """Warns if the settings name matrices of the model for which the adapter has none."""
    settings = adapter.settings
    if settings.targets is None:
        return
    missing = [
        name
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and name.endswith(_WEIGHT)
        if settings.changes(name.removesuffix(_WEIGHT)) and name not in adapter.low_rank
    ]
    if missing:
        warnings.warn(
            f"{settings.where} names modules for which the adapter has no matrices, they stay as they are in the "
            f"model: {printable_list(sorted(missing))}; download the adapter again if this is not meant",
            stacklevel=7,
        )
