"""Opens the weights of a model folder, in whichever kind of files they are.

Safetensors files win where there are both, as in transformers.
"""

from collections.abc import Mapping
from pathlib import Path

from decodax.models.checkpoints.model_files import find_file, has_orbax_arrays
from decodax.models.checkpoints.orbax_arrays import open_arrays
from decodax.models.checkpoints.pickled_files import open_pickled_weights, pickled_weight_files
from decodax.models.checkpoints.safetensors_files import INDEX_FILE, SINGLE_FILE, Entry, open_weights, weight_files


def open_model_weights(folder: Path) -> Mapping[str, Entry]:
    """Every tensor of a folder by name, in the order in which they are stored.

    Raises FileNotFoundError if there are no weights, or a file is missing; ValueError for a damaged file.
    """
    if has_orbax_arrays(folder):
        return open_arrays(folder)
    stored = {} if _has_safetensors(folder) else open_pickled_weights(folder)
    return stored or open_weights(folder)


def model_weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, if they are no Orbax checkpoint; raises what `open_model_weights` raises."""
    files = [] if _has_safetensors(folder) else pickled_weight_files(folder)
    return files or weight_files(folder)


def _has_safetensors(folder: Path) -> bool:
    return any(find_file(folder, name) is not None for name in (SINGLE_FILE, INDEX_FILE))
