"""Merges a LoRA adapter into a model's weights: `decodax.load(..., adapter=FOLDER)`.

The result is another model: lossless strategies are compared with plain decoding of that model. Adapters of the PEFT
library are merged as the model is read (`models/checkpoints/adapters/`), the one of `layer_skip` afterwards.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from decodax.core.arguments import folder_name, in_order, refusal
from decodax.decoding.auxiliary_weights import AuxiliaryWeights, find_auxiliary_weights
from decodax.layers.adapters.low_rank import merged
from decodax.models.checkpoints.adapter_files import SETTINGS_FILE, is_adapter
from decodax.models.load import LanguageModel

KIND = "layer_skip"


Adapter = str | Path | AuxiliaryWeights


def adapter_list(given: Any) -> list[Adapter]:
    """What `adapter` names, one or several; ValueError for anything else."""
    several = None if isinstance(given, AuxiliaryWeights | str) else in_order(given)
    return [
        entry
        if isinstance(entry, AuxiliaryWeights)
        else folder_name("adapter", entry, ", or an AuxiliaryWeights, or a list of them")
        for entry in ([given] if several is None else several)
    ]


def split_adapters(adapters: Sequence[Adapter], folder: Path) -> tuple[list[Path], Adapter | None]:
    """The folders of the adapters of the PEFT library, and the adapter of `layer_skip` after them, if any.

    folder: of the model, in which an adapter may be named.
    Raises ValueError for an adapter of `layer_skip` before another.
    """
    places = [None if isinstance(entry, AuxiliaryWeights) else find_adapter(entry, folder) for entry in adapters]
    peft = [place for place in places if place is not None and is_adapter(place)]
    if len(peft) == len(places):
        return peft, None
    if len(peft) < len(places) - 1 or places[-1] in peft:
        raise refusal(
            "adapter",
            f"LoRA adapters of the PEFT library (folders with {SETTINGS_FILE}), of which only the last may be made by "
            "`decodax train layer_skip`",
            [str(place or "AuxiliaryWeights") for place in places],
        )
    return peft, adapters[-1]


def find_adapter(adapter: str | Path, folder: Path) -> Path:
    """The folder of an adapter, which may be named in the model's own folder."""
    given, inside = Path(adapter).expanduser(), folder / adapter
    return inside if inside.is_dir() and not given.exists() else given


def with_adapter(lm: LanguageModel, adapter: Adapter) -> LanguageModel:
    """`lm` with the LoRA adapter of `layer_skip` added to its weights, in their dtype and with their shardings.

    adapter: a folder that `decodax train layer_skip` wrote, or the name of one inside the model's own folder.
    Raises FileNotFoundError where there is none.
    Raises ValueError when it is of another kind or fits another model.
    """
    if not isinstance(adapter, AuxiliaryWeights):
        adapter = find_adapter(adapter, lm.path)
    found = find_auxiliary_weights(KIND, lm, adapter)
    params = lm.model.unstacked(lm.params)
    params = lm.model.stacked(merged(params, found.params["low_rank"]))
    params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, lm.params)
    return dataclasses.replace(lm, params=params, adapter=found)
