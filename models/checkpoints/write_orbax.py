"""Writes a model as an Orbax checkpoint: from a Hugging Face folder, or from anything that `decodax.load` gives.

    target/config.json, tokenizer.json, ...    as in the source
    target/decodax.json                        the manifest (`models/checkpoints/conversion.py`)
    target/params/                             the Orbax checkpoint (`models/checkpoints/orbax_writing.py`)

`decodax.load(target)` reads it; so does `orbax.checkpoint.PyTreeCheckpointer().restore(target / "params")`. One chunk
at a time is in memory. An interrupted run continues when it is started again (`models/checkpoints/staged_folder.py`).
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from decodax.models.checkpoints import conversion
from decodax.models.checkpoints import orbax_writing as arrays
from decodax.models.checkpoints.name_map import Region, region_shape
from decodax.models.checkpoints.orbax_arrays import array_name
from decodax.models.checkpoints.orbax_files import FOLDER, METADATA
from decodax.models.checkpoints.reading import Progress, held_shape, shardings_on
from decodax.models.checkpoints.staged_folder import StagedFolder
from decodax.models.families.contract import ParameterPath
from decodax.models.load import LanguageModel
from decodax.models.mesh_fitting import mesh_for
from decodax.sharding.mesh import read_mesh
from decodax.sharding.rules import RULES, Rules


def from_hf(
    source: str | os.PathLike[str] | LanguageModel,
    target: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | str | None = None,
    rules: Rules = RULES,
    adapters: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> conversion.Conversion:
    """Writes the folder `target`.

    source: a model folder, also an Orbax one (to chunk or round it differently), or a loaded model.
    target: the folder to write.
    dtype: "float32", "bfloat16" or "float16", to which every weight is rounded; None keeps what is stored.
    mesh, rules: as for `decodax.load`. The arrays are chunked so that each device of this mesh reads complete files;
        any mesh reads any checkpoint, with this or without.
    adapters: folders of LoRA adapters of the PEFT library, to be merged into the weights in order.
    overwrite: replace a checkpoint that is there.
    progress: called with (bytes done, bytes in all).
    Raises FileExistsError for a target that is not replaced (`models/checkpoints/convert_target.py`).
    Raises ValueError for a source that does not fit its config, and DiskFullError (an OSError).
    Warns with NonFiniteWeightWarning, and of tensors that are left out.
    """
    target = conversion.absolute_target(target)
    opened = conversion.open_source(source, adapters)
    dtypes, weights = opened.dtypes(dtype), opened.weights.weights
    mesh = read_mesh(mesh) if isinstance(mesh, str) else mesh
    sharding_of = shardings_on(None if mesh is None else mesh_for(mesh, opened.config, rules), rules)
    chunks = {}
    for path, weight in weights.items():
        sharding = None if sharding_of is None else sharding_of(weight, path)
        shard = None if sharding is None else sharding.shard_shape(held_shape(weight.shape, sharding))
        chunks[path] = arrays.chunk_shape(weight.shape, dtypes[path].itemsize, shard)

    def chunks_of(path: ParameterPath) -> list[tuple[str, Region]]:
        name = array_name(path)
        return [(f"{name}/{file}", region) for file, region in arrays.chunk_regions(weights[path].shape, chunks[path])]

    pieces = {
        piece: math.prod(region_shape(region)) * dtypes[path].itemsize
        for path in weights
        for piece, region in chunks_of(path)
    }

    def write(folder: StagedFolder, wrote: Callable[[int], None]) -> None:
        root = folder.content / FOLDER
        for path, weight in weights.items():
            missing = [(piece, region) for piece, region in chunks_of(path) if piece not in folder.done]
            if not missing:
                continue
            array = arrays.create_array(root, array_name(path), weight.shape, dtypes[path], chunks[path])
            for piece, region in missing:
                arrays.write_chunk(array, region, opened.weights.read(path, region, dtypes[path]))
                folder.note(piece, pieces[piece], lambda: None)  # it is on the disk
                wrote(pieces[piece])
        folder.flush(lambda: None)
        for left in root.rglob("*.__lock"):  # of a chunk that a killed process was writing
            left.unlink()
        metadata = arrays.metadata_of({path: weight.shape for path, weight in weights.items()})
        folder.write_file(f"{FOLDER}/{METADATA}", json.dumps(metadata).encode())

    mesh_shape = None if mesh is None else dict(mesh.shape)
    description = conversion.manifest(opened, dtypes, "orbax", [], cut_for_mesh=mesh_shape)
    config = conversion.config_json(opened, dtypes)
    return conversion.convert(
        opened, target, description, config, pieces, write, overwrite=overwrite, progress=progress
    )
