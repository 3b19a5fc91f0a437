"""Loads a checkpoint's weights (safetensors or pickled files, Orbax arrays, GGUF) into parameters.

One parameter at a time, in pieces: from the mapped file, cast on the way, into aligned host buffers, and from there to
the devices. With a sharding, each slice that a device of this process holds is read separately and only once, so a
process reads no more than its devices hold. On CPU such a buffer becomes the device's shard itself, and reading costs
no more host memory than the parameters, one piece, and UNMAPPED_BYTES of the files; on an accelerator it costs one
slice. Nothing refers to the files afterwards.

`models/checkpoints/model_source.py` opens the files, `models/checkpoints/name_map_selection.py` finds the tensors
that fill each parameter, `models/checkpoints/name_map.py` says which slice of them, and `models/checkpoints/formats/`
presents packed weights (FP8, GPTQ, ...) under their own names. `models/checkpoints/orbax_arrays.py` presents the arrays
of an Orbax checkpoint like tensors of such files.
"""

import math
import mmap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding

from decodax.core.printable import printable, printable_list
from decodax.core.weight import Weight
from decodax.models.checkpoints.adapter_files import warn_of_adapter
from decodax.models.checkpoints.adapters.source import AdaptedSource
from decodax.models.checkpoints.formats.view import Quantization, quantization_of, readable
from decodax.models.checkpoints.mismatch_report import mismatch_error
from decodax.models.checkpoints.model_files import has_orbax_arrays, parse_json_object
from decodax.models.checkpoints.model_source import ModelSource, source_of
from decodax.models.checkpoints.name_map import NameMaps, Region, full_region, region_shape, single_tensor, transfers
from decodax.models.checkpoints.name_map_selection import Expected, Filled, Match, match_tensors
from decodax.models.checkpoints.name_prefix import TensorNames
from decodax.models.checkpoints.orbax_arrays import OTHER_WEIGHTS, array_name, check_arrays
from decodax.models.checkpoints.safetensors_files import Entry, forget_pages, mappings_of
from decodax.models.config import ModelConfig
from decodax.models.configs.text_config import OTHER_PARTS, is_multimodal, text_fields
from decodax.models.configs.wrong_fields import explained
from decodax.models.families.contract import Family, ParameterPath
from decodax.sharding.rules import Rules, divided_shape

Device = Any  # jax.Device, which type checkers take for a variable
ShardingOf = Callable[[Weight, ParameterPath], Sharding]
Progress = Callable[[int, int], None]

PIECE_BYTES = 2**20  # read at once: small beside any weight that matters, and within a processor's cache
UNMAPPED_BYTES = 2**24  # read from files before the memory of their pages is released
_ALIGNMENT_BYTES = 64  # that JAX requires of a host buffer to use it in place
_FORMER_NAME = ".mixer.query_key_value_gate"  # in Orbax checkpoints of former versions
_NAMED_WEIGHTS = 8  # in a warning
_HUGE_PAGE_BYTES = 2**21  # Linux's large pages, for which NumPy asks with arrays of twice that size and more


class NonFiniteWeightWarning(UserWarning):
    """A checkpoint holds NaN or infinity: what the model computes from it will most likely be NaN."""


@dataclass
class StoredWeights:
    """The parameters of a checkpoint that is known to hold them all, not read yet.

    folder: of the checkpoint.
    weights: descriptions of the parameters, in the order of the files.
    filled: what fills each parameter.
    stored: all tensors of the files, by name.
    names: the prefixes of the names in the files.
    not_finite: the tensors in which NaN or infinity has been read so far, by name.
    """

    folder: Path
    weights: Mapping[ParameterPath, Weight]
    filled: Filled
    stored: Mapping[str, Entry]
    names: TensorNames
    not_finite: dict[str, None] = field(default_factory=dict)
    _mapped_bytes: int = 0

    @cached_property
    def _mappings(self) -> list[mmap.mmap]:
        return mappings_of(self.stored)

    def dtype(self, path: ParameterPath) -> np.dtype:
        """The type that holds a parameter's stored numbers exactly."""
        kinds = {tensor.dtype for _, tensor in self.filled[path]}
        if len(kinds) == 1:  # JAX would make float32 of float64
            return next(iter(kinds))
        return np.dtype(jnp.promote_types(*kinds) if len(kinds) == 2 else jnp.result_type(*kinds))

    def read(self, path: ParameterPath, region: Region, dtype: np.dtype) -> np.ndarray:
        """The numbers of a parameter's region, rounded to `dtype`, in a `host_buffer` of their own."""
        host = host_buffer(region_shape(region), dtype)
        for source, tensor in self.filled[path]:
            for place, piece in transfers(source, tensor, self.weights[path].shape, region, host, PIECE_BYTES):
                with np.errstate(all="ignore"):  # what overflows in a narrower type is found below
                    place[...] = piece
                if not _is_finite(place):
                    self.not_finite[tensor.label] = None
                self._mapped_bytes += len(place) * math.prod(tensor.shape[-1:]) * tensor.dtype.itemsize  # full rows
                if self._mapped_bytes >= UNMAPPED_BYTES:
                    self.forget_pages()
        return host

    def forget_pages(self) -> None:
        """Releases the memory of the mapped files' pages that were read."""
        forget_pages(self._mappings)
        self._mapped_bytes = 0

    def warn(self, stacklevel: int) -> None:
        """Warns with NonFiniteWeightWarning if something read was not finite."""
        if self.not_finite:
            warnings.warn(
                f"NaN or infinity in {len(self.not_finite)} weight(s) of {printable(self.folder)}: "
                f"{printable_list(self.not_finite, most=_NAMED_WEIGHTS)}",
                NonFiniteWeightWarning,
                stacklevel=stacklevel + 1,
            )


def open_params(place: Path | ModelSource, family: Family, config: ModelConfig) -> StoredWeights:
    """Opens the parameters of a source, a folder or a GGUF file, to be read region by region.

    Raises FileNotFoundError for missing files.
    Raises ValueError for damaged files, and with a list of every missing, surplus and misshapen weight, or the field
    of the config that causes them.
    Warns if the files have a wrapper's names, and of an adapter that is not applied.
    """
    source = source_of(place)
    folder = source.path
    adapters = source.adapters if isinstance(source, AdaptedSource) else ()
    if not any(adapter.folder.resolve() == folder.resolve() for adapter in adapters):
        warn_of_adapter(folder, stacklevel=4)
    raw = _raw_config(source)
    stored = _open(source, raw)

    def expected_of(config: ModelConfig) -> Expected:
        return _expected_model(source, raw, family, config)

    if isinstance(source, AdaptedSource):
        stored = source.with_own_head(stored, expected_of(config))
    match = match_tensors(stored, expected_of(config))
    if match.report():
        if has_orbax_arrays(folder) and any(name.endswith(_FORMER_NAME) for name in stored):
            raise ValueError(
                f"{printable(folder)} was converted before the parameters of the gated delta rule were split: convert "
                f"the model's own folder again (decodax convert FOLDER -o {printable(folder)} --overwrite)"
            )
        raise mismatch_error(printable(folder), explained(text_fields(raw), stored, match, expected_of))
    if match.names.is_wrapped and not is_multimodal(raw):
        body, head = printable(match.names.body), printable(match.names.in_file(family.outer_name("head")))
        warnings.warn(
            f"the weights in {printable(folder)} have the names of something that wraps the model: they are read with "
            f"{body} in place of {family.body_prefix} and {head} as the head",
            stacklevel=4,
        )
    if isinstance(source, AdaptedSource):
        match = source.merged(match, stored)
    return _found(folder, stored, match, config.weights())


def _open(source: ModelSource, raw: Mapping[str, Any]) -> Mapping[str, Entry]:
    """The stored tensors; `raw` has the fields of the source's `config.json`."""
    quantization = None if has_orbax_arrays(source.path) else _quantization(raw)
    return readable(source.tensors(), quantization)


def _found(folder: Path, stored: Mapping[str, Entry], match: Match, weights: Mapping[str, Any]) -> StoredWeights:
    described, filled = flat_weights(weights), match.filled(stored)
    if has_orbax_arrays(folder):
        check_arrays(folder, [tensor for pairs in filled.values() for _, tensor in pairs])
    return StoredWeights(folder, {path: described[path] for path in filled}, filled, stored, match.names)


def _expected_model(source: ModelSource, raw: Mapping[str, Any], family: Family, config: ModelConfig) -> Expected:
    if has_orbax_arrays(source.path):
        return _expected(source, raw, {}, config.weights(), elsewhere=OTHER_WEIGHTS)
    tied_head = (family.outer_name("head"), family.outer_name("embedding")) if config.tie_embeddings else None
    others = [] if family.elsewhere is None else [family.elsewhere(config)]
    others += [OTHER_PARTS] if is_multimodal(raw) else []
    elsewhere = "|".join(f"(?:{names})" for names in others) or None
    name_maps = family.name_maps(config)
    found = _expected(source, raw, name_maps, config.weights(), tied_head=tied_head, elsewhere=elsewhere)
    return replace(found, body_prefix=family.body_prefix)


def _expected(
    source: ModelSource,
    raw: Mapping[str, Any],
    name_maps: Mapping[ParameterPath, NameMaps],
    weights: Mapping[str, Any],
    *,
    tied_head: tuple[str, str] | None = None,
    elsewhere: str | None,
) -> Expected:
    shapes = {path: weight.shape for path, weight in flat_weights(weights).items()}
    if has_orbax_arrays(source.path):
        return Expected({path: single_tensor(array_name(path)) for path in shapes}, shapes, elsewhere=elsewhere)
    return Expected(name_maps, shapes, _quantization(raw), tied_head, elsewhere)


def open_auxiliary_weights(
    folder: Path,
    name_maps: Mapping[ParameterPath, NameMaps],
    weights: Mapping[str, Any],
    *,
    elsewhere: str | None = ".*",
) -> StoredWeights:
    """Opens some parameters of a checkpoint, such as those of an MTP head.

    folder: of the checkpoint.
    name_maps: of every parameter; an Orbax checkpoint has the parameters' own names, whatever these say.
    weights: descriptions of the parameters.
    elsewhere: a regular expression for the full names of stored tensors that belong to something else; by default
        all that the name maps do not name.
    Raises what `open_params` raises.
    """
    source = source_of(folder)
    raw = _raw_config(source)
    stored = _open(source, raw)
    match = match_tensors(stored, _expected(source, raw, name_maps, weights, elsewhere=elsewhere))
    if lines := match.report():
        raise mismatch_error(printable(folder), lines)
    return _found(folder, stored, match, weights)


def load_params(
    folder: Path | ModelSource,
    family: Family,
    config: ModelConfig,
    *,
    dtype: jnp.dtype,
    sharding_of: ShardingOf | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loads the parameters of a folder, nested like `config.weights()`.

    folder, family, config: as for `open_params`.
    dtype: to which every leaf is cast that has no dtype of its own (`Weight.dtype`).
    sharding_of: (description, path) -> sharding of a parameter; by default all are on the first device.
    progress: called with (bytes done, bytes in all) after each parameter; of what this process's devices hold.
    Raises what `open_params` raises. Warns with NonFiniteWeightWarning.
    """
    opened = open_params(folder, family, config)
    return read_params(opened, dtype=dtype, sharding_of=sharding_of, progress=progress)


def read_params(
    opened: StoredWeights,
    *,
    dtype: jnp.dtype,
    sharding_of: ShardingOf | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All these parameters on their devices, padded with zeros on axes that would not divide.

    opened: the parameters.
    dtype, sharding_of, progress: as for `load_params`, and so is the warning.
    """
    dtypes = {path: weight.dtype_in(dtype) for path, weight in opened.weights.items()}
    shardings = {path: sharding_of(weight, path) if sharding_of else None for path, weight in opened.weights.items()}
    shapes = {path: held_shape(opened.weights[path].shape, sharding) for path, sharding in shardings.items()}
    slices = {path: _local_slices(shapes[path], sharding) for path, sharding in shardings.items()}
    sizes = {
        path: sum(math.prod(region_shape(region)) for region, _ in local) * dtypes[path].itemsize
        for path, local in slices.items()
    }
    done, leaves = 0, {}
    for path, sharding in shardings.items():
        leaves[path] = _leaf(opened, path, shapes[path], dtypes[path], sharding, slices[path])
        done += sizes[path]
        if progress is not None:
            progress(done, sum(sizes.values()))
    opened.forget_pages()
    opened.warn(stacklevel=4)
    return nested(leaves)


def held_shape(shape: tuple[int, ...], sharding: Sharding | None) -> tuple[int, ...]:
    """The shape of a parameter on its devices: padded if the sharding would not divide it."""
    return divided_shape(shape, sharding) if isinstance(sharding, NamedSharding) else shape


def _local_slices(shape: tuple[int, ...], sharding: Sharding | None) -> list[tuple[Region, list[Device | None]]]:
    """The distinct slices that devices of this process hold, each with those devices; None is the first device."""
    if sharding is None:
        return [(full_region(shape), [None])]
    holders: dict[tuple[tuple[int, int], ...], list[Device | None]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(span.indices(size)[:2] for span, size in zip(index or (), shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    return [(tuple(slice(*bound) for bound in bounds), devices) for bounds, devices in holders.items()]


def _leaf(
    opened: StoredWeights,
    path: ParameterPath,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding | None,
    slices: list[tuple[Region, list[Device | None]]],
) -> jax.Array:
    """One parameter on its devices; a slice's host buffer that was copied is freed before the next is made."""
    shards: list[jax.Array] = []
    for region, devices in slices:
        host = _read_padded(opened, path, region, dtype)
        shards += jax.block_until_ready([to_device(host, device) for device in devices])
    if sharding is None:
        return shards[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)


def _read_padded(opened: StoredWeights, path: ParameterPath, region: Region, dtype: np.dtype) -> np.ndarray:
    """A region of a parameter, with zeros beyond the parameter's end."""
    ends = opened.weights[path].shape
    inside = tuple(slice(min(span.start, end), min(span.stop, end)) for span, end in zip(region, ends, strict=True))
    if inside == region:
        return opened.read(path, region, dtype)
    host = host_buffer(region_shape(region), dtype)
    host[...] = 0
    found = region_shape(inside)
    if math.prod(found):
        host[tuple(map(slice, found))] = opened.read(path, inside, dtype)
    return host


def to_device(host: np.ndarray, device: Device | None) -> jax.Array:
    """The array on a device; on CPU it is the aligned host array itself, which must not be written again."""
    return jax.device_put(host, device)


def shardings_on(mesh: Mesh | None, rules: Rules) -> ShardingOf | None:
    """The sharding of each parameter on a mesh; None (the first device) without one."""
    if mesh is None:
        return None
    return lambda weight, path: rules.sharding(mesh, weight, "/".join(path))


def _raw_config(source: ModelSource) -> dict[str, Any]:
    """The fields of a source's `config.json`; empty without the file."""
    content = source.read("config.json")
    return {} if content is None else parse_json_object(content, source.where("config.json"))


def _quantization(raw: Mapping[str, Any]) -> Quantization | None:
    """The weight format that a `config.json` names; a folder without the file has plain weights."""
    return quantization_of(text_fields(raw))


def host_buffer(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can use in place on CPU; a large one starts at a large page.

    Decoding on CPU reads every weight at every step: weights in large pages were measured 11 % faster.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    alignment = _HUGE_PAGE_BYTES if size_bytes >= 2 * _HUGE_PAGE_BYTES else _ALIGNMENT_BYTES
    raw = np.empty(size_bytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size_bytes].view(dtype).reshape(shape)


def _is_finite(array: np.ndarray) -> bool:
    """Whether all values are finite, from the bits: as fast as reading, also for types that NumPy emulates."""
    bits = np.dtype(f"u{array.dtype.itemsize}")
    magnitude = array.view(bits) & bits.type(np.iinfo(bits).max >> 1)
    infinity = np.array(np.inf, array.dtype).view(bits)
    return bool(magnitude.max(initial=0) < infinity)


def flat_weights(tree: Mapping[str, Any], prefix: ParameterPath = ()) -> dict[ParameterPath, Weight]:
    """The leaves of nested descriptions, by path."""
    leaves: dict[ParameterPath, Weight] = {}
    for name, value in tree.items():
        leaves |= {(*prefix, name): value} if isinstance(value, Weight) else flat_weights(value, (*prefix, name))
    return leaves


def nested(leaves: Mapping[ParameterPath, Any]) -> dict[str, Any]:
    """The inverse of `flat_weights`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree
