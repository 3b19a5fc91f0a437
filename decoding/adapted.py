"""Merges a LoRA adapter into a model's weights: `decodax.load(..., adapter=FOLDER)`.

The result is another model: lossless strategies are compared with plain decoding of that model.
"""

import dataclasses
from pathlib import Path

import jax

from decodax.decoding.auxiliary_weights import AuxiliaryWeights, find_auxiliary_weights
from decodax.layers.adapters.low_rank import merged
from decodax.models.load import LanguageModel

KIND = "layer_skip"


def with_adapter(lm: LanguageModel, adapter: str | Path | AuxiliaryWeights) -> LanguageModel:
    """`lm` with the LoRA adapter of `layer_skip` added to its weights, in their dtype and with their shardings.

    adapter: a folder that `decodax train layer_skip` wrote, or the name of one inside the model's own folder.
    Raises FileNotFoundError where there is none.
    Raises ValueError when it is of another kind or fits another model.
    """
    if not isinstance(adapter, AuxiliaryWeights):
        given, inside = Path(adapter).expanduser(), lm.path / adapter
        adapter = inside if inside.is_dir() and not given.exists() else given
    found = find_auxiliary_weights(KIND, lm, adapter)
    params = lm.model.unstacked(lm.params)
    params = lm.model.stacked(merged(params, found.params["low_rank"]))
    params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, lm.params)
    return dataclasses.replace(lm, params=params, adapter=found)
