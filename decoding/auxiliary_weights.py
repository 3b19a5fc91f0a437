"""Reads and writes auxiliary weights: a folder with facts (`auxiliary.json`) and `auxiliary.safetensors`.

A draft model is a Hugging Face folder instead. All other auxiliary weights are read and written here, and checked
against the model that they are for.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from decodax.core.arguments import folder_name
from decodax.core.printable import printable
from decodax.decoding.auxiliary_check import MEASURED, check_auxiliary_weights, check_value
from decodax.models.checkpoints.model_files import find_file, read_json_object
from decodax.models.checkpoints.weight_formats import read_floats
from decodax.models.load import find_folder
from decodax.models.model import Params

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

FACTS_FILE, WEIGHTS_FILE = "auxiliary.json", "auxiliary.safetensors"
_SECTIONS = ("about", "calibration", "heldout", "published")  # facts that must be objects
_MOST_KEYS = 16  # in the name of a weight


@dataclass(frozen=True, eq=False)
class AuxiliaryWeights:
    """Weights that are trained for a strategy, beside the model's own.

    kind: the strategy they are for, or what they are.
    params: nested dictionaries of arrays.
    facts: the rest of `auxiliary.json`: the model they were made for, their settings (`about.shape`), what was measured
        on held-out text (`heldout`), how they were trained.
    name: of the folder, for messages.
    """

    kind: str
    params: Params
    facts: dict[str, Any]
    name: str = ""

    @property
    def label(self) -> str:
        """The name in messages."""
        return printable(self.name) or "the auxiliary weights"

    @property
    def shape(self) -> dict[str, Any]:
        """The settings. Raises ValueError where the facts have none."""
        shape = self.facts.get("about", {}).get("shape")
        if not isinstance(shape, dict):
            raise ValueError(f"about.shape of {self.label} must be an object with its settings, got {shape!r:.99}")
        return shape

    def measured(self, name: str) -> Any:
        """What was measured under this name: on calibration text, else on held-out text, else the published value.

        A published value may have been measured for another model.

        Raises ValueError where there is none, or one of the wrong form.
        """
        for text in ("calibration", "heldout", "published"):
            if name in self.facts.get(text, {}):
                check_value(f"{text}.{name} of {self.label}", self.facts[text][name], MEASURED[name])
                return self.facts[text][name]
        raise ValueError(
            f"{name}, by which a draft is chosen, is missing in {self.label}: build a Speculation and pass it as "
            "`strategy=`"
        )

    @property
    def rank_accuracy(self) -> list[list[float]]:
        """For each distance, the accuracy of the first, second, ... token. Raises ValueError where it is missing."""
        return self.measured("rank_accuracy")


def write_auxiliary_weights(folder: Path, auxiliary: AuxiliaryWeights, dtype: str) -> None:
    """Writes the weights, rounded to `dtype`, then the facts; each file is replaced atomically."""
    leaves = jax.tree_util.tree_flatten_with_path(auxiliary.params)[0]
    tensors = {".".join(key.key for key in path): np.asarray(leaf).astype(jnp.dtype(dtype)) for path, leaf in leaves}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".auxiliary.tmp"
    save_file(tensors, temporary)
    os.chmod(temporary, 0o644)
    os.replace(temporary, folder / WEIGHTS_FILE)
    temporary.write_text(json.dumps({"kind": auxiliary.kind, **auxiliary.facts}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / FACTS_FILE)


def read_auxiliary_weights(folder: str | Path, dtype: Any) -> AuxiliaryWeights:
    """Reads a folder of auxiliary weights, which become `dtype`.

    Raises FileNotFoundError where a file is missing.
    Raises ValueError, naming file and field, where one cannot be read, and for weights that are not floating-point
    numbers, or not finite in `dtype`.
    """
    path = Path(folder).expanduser()
    facts_file, weights_file = find_file(path, FACTS_FILE), find_file(path, WEIGHTS_FILE)
    if facts_file is None or weights_file is None:
        name = FACTS_FILE if facts_file is None else WEIGHTS_FILE
        raise FileNotFoundError(f"{path} holds no {name}: give the folder that `decodax train` wrote")
    facts = read_json_object(facts_file)
    kind = facts.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError(f"{printable(facts_file)} must say its kind as a text, got {kind!r:.99}")
    for section in _SECTIONS:
        if not isinstance(facts.get(section, {}), dict):
            raise ValueError(f"{section} in {printable(facts_file)} must be an object, got {facts[section]!r:.99}")
    tensors = read_floats(weights_file, dtype)
    return AuxiliaryWeights(kind, _nested(weights_file, tensors), facts, path.name)


def _nested(file: Path, tensors: Mapping[str, np.ndarray]) -> Params:
    """The tensors in nested dictionaries; dots separate the keys in a tensor's name."""
    params: Params = {}
    for name, array in tensors.items():
        *nodes, leaf = name.split(".")
        if len(nodes) >= _MOST_KEYS:
            raise ValueError(f"{printable(file)} must name weights by at most {_MOST_KEYS} keys, got {printable(name)}")
        subtree: Any = params
        for node in nodes:
            subtree = subtree.setdefault(node, {}) if isinstance(subtree, dict) else None
        if not isinstance(subtree, dict) or leaf in subtree:
            raise ValueError(f"{printable(file)} names a weight {printable(name)} and another inside it")
        subtree[leaf] = jnp.asarray(array)
    return params


def find_auxiliary_weights(kind: str, lm: "LanguageModel", given: Any) -> AuxiliaryWeights:
    """The auxiliary weights given, as a folder or an `AuxiliaryWeights`, or those of the embedded model.

    Raises ValueError when there are none, when they are of another kind, were made for a model of other sizes, or their
    weights or settings are not those of their kind.
    """
    if given is None:
        if lm.path != find_folder(None):
            raise ValueError(
                f"strategy {kind!r} needs auxiliary weights trained for {lm.path.name}: pass draft=FOLDER "
                f"(`decodax train {kind}` makes them)"
            )
        given = lm.path / kind
    if not isinstance(given, AuxiliaryWeights):
        given = folder_name("draft", given, f" (for strategy {kind!r})")
        given = read_auxiliary_weights(given, lm.dtype)
    if given.kind != kind:
        raise ValueError(
            f"strategy {kind!r} needs weights of that kind, {given.label} holds {printable(repr(given.kind))}"
        )
    sizes = (
        ("hidden_size", lm.config.hidden_size, "hidden size"),
        ("vocab_size", lm.config.vocab_size, "vocabulary"),
        ("layers", lm.config.num_layers, "number of layers"),
    )
    for name, expected, word in sizes:
        found = given.facts.get(f"target_{name}", expected)
        if found != expected:
            raise ValueError(
                f"{given.label} was made for a model whose {word} is {printable(found)}, and that of {lm.path.name} is "
                f"{expected}: train weights for this model with `decodax train {kind}`"
            )
    check_auxiliary_weights(given.label, kind, given.shape, given.params, lm)
    return given
