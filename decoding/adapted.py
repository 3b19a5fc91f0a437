"""A model with a trained change merged into its weights: what `decodax.load(..., adapter=FOLDER)` gives.

The changed model is another model: its own plain decoding is what lossless strategies are compared with.
"""

import dataclasses
from pathlib import Path

import jax

from decodax.decoding.trained_part import TrainedPart, find_part
from decodax.layers.adapters.low_rank import merged
from decodax.models.load import LanguageModel

KIND = "layer_skip"


def with_adapter(lm: LanguageModel, adapter: str | Path | TrainedPart) -> LanguageModel:
    """`lm` with the low-rank change of a `layer_skip` part added to its weights, in their dtype and where they lie.

    adapter: a folder that `decodax train layer_skip` wrote, or the name of one inside the model's own folder.
    Raises FileNotFoundError where there is none, ValueError when it is of another kind or fits another model.
    """
    if not isinstance(adapter, TrainedPart):
        given, inside = Path(adapter).expanduser(), lm.path / adapter
        adapter = inside if inside.is_dir() and not given.exists() else given
    part = find_part(KIND, lm, adapter)
    params = lm.model.unstacked(lm.params)
    params = lm.model.stacked(merged(params, part.params["low_rank"]))
    params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, lm.params)
    return dataclasses.replace(lm, params=params, adapter=part)
