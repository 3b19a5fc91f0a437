"""A small trained part of a strategy as a folder: `part.json` says what it is, `part.safetensors` holds its weights.

Parts that are whole language models (a draft) are Hugging Face folders instead; all others are read and written here,
and checked against the model that they shall serve.
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

from decodax.arguments import folder_name
from decodax.decoding.part_check import MEASURED, check_part, check_value
from decodax.models.load import find_folder
from decodax.models.model import Params
from decodax.models.model_files import find_file, printable, read_json_object
from decodax.models.stored_formats import read_floats

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

PART_FILE, WEIGHTS_FILE = "part.json", "part.safetensors"
_SECTIONS = ("about", "calibration", "heldout", "published")  # of the facts that are objects themselves
_MOST_KEYS = 16  # that lead to a weight


@dataclass(frozen=True, eq=False)
class TrainedPart:
    """kind: the strategy it belongs to, or what it is. params: nested dictionaries of arrays.

    facts: what `part.json` says beside the kind: the model it was made for, its shape (`about.shape`), what was
    measured on held-out text (`heldout`), how it was trained.
    """

    kind: str
    params: Params
    facts: dict[str, Any]
    name: str = ""

    @property
    def label(self) -> str:
        """What messages call it."""
        return printable(self.name) or "the part"

    @property
    def shape(self) -> dict[str, Any]:
        """What the part's settings are; ValueError where its facts say none."""
        shape = self.facts.get("about", {}).get("shape")
        if not isinstance(shape, dict):
            raise ValueError(f"about.shape of {self.label} must be an object with its settings, got {shape!r:.99}")
        return shape

    def measured(self, name: str) -> Any:
        """What was measured under this name on the text to choose by, or else on held-out text, or else published.

        What was published may have been measured for another model. Raises ValueError where there is nothing, or
        something else than was to be measured.
        """
        for text in ("calibration", "heldout", "published"):
            if name in self.facts.get(text, {}):
                check_value(f"{text}.{name} of {self.label}", self.facts[text][name], MEASURED[name])
                return self.facts[text][name]
        raise ValueError(
            f"{self.label} does not say its {name}, by which a draft is chosen: make a drafter by hand, "
            "and pass it as `strategy=`"
        )

    @property
    def rank_accuracy(self) -> list[list[float]]:
        """For each distance, how often the first, second, ... guess was right; ValueError where nobody knows."""
        return self.measured("rank_accuracy")


def write_part(folder: Path, part: TrainedPart, dtype: str) -> None:
    """Writes weights, rounded to `dtype`, then facts; each file is replaced at once."""
    leaves = jax.tree_util.tree_flatten_with_path(part.params)[0]
    tensors = {".".join(key.key for key in path): np.asarray(leaf).astype(jnp.dtype(dtype)) for path, leaf in leaves}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".part.tmp"
    save_file(tensors, temporary)
    os.chmod(temporary, 0o644)
    os.replace(temporary, folder / WEIGHTS_FILE)
    temporary.write_text(json.dumps({"kind": part.kind, **part.facts}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / PART_FILE)


def read_part(folder: str | Path, dtype: Any) -> TrainedPart:
    """Reads a part's folder; its weights become `dtype`.

    Raises FileNotFoundError where there is none; ValueError, naming file and field, where it cannot be read, and for
    weights that are no floating-point numbers, or not finite in `dtype`.
    """
    path = Path(folder).expanduser()
    facts_file, weights_file = find_file(path, PART_FILE), find_file(path, WEIGHTS_FILE)
    if facts_file is None or weights_file is None:
        name = PART_FILE if facts_file is None else WEIGHTS_FILE
        raise FileNotFoundError(f"{path} holds no {name}: give the folder that `decodax train` wrote")
    facts = read_json_object(facts_file)
    kind = facts.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError(f"{printable(facts_file)} must say its kind as a text, got {kind!r:.99}")
    for section in _SECTIONS:
        if not isinstance(facts.get(section, {}), dict):
            raise ValueError(f"{section} in {printable(facts_file)} must be an object, got {facts[section]!r:.99}")
    tensors = read_floats(weights_file, dtype)
    return TrainedPart(kind, _nested(weights_file, tensors), facts, path.name)


def _nested(file: Path, tensors: Mapping[str, np.ndarray]) -> Params:
    """The tensors in dictionaries within one another, by the keys that their names join with dots."""
    params: Params = {}
    for name, array in tensors.items():
        *nodes, leaf = name.split(".")
        if len(nodes) >= _MOST_KEYS:
            raise ValueError(f"{printable(file)} must name weights by at most {_MOST_KEYS} keys, got {printable(name)}")
        subtree: Any = params
        for node in nodes:
            subtree = subtree.setdefault(node, {}) if isinstance(subtree, dict) else None
        if not isinstance(subtree, dict) or leaf in subtree:
            raise ValueError(f"{printable(file)} names a weight {printable(name)} and another that it would stand in")
        subtree[leaf] = jnp.asarray(array)
    return params


def find_part(kind: str, lm: "LanguageModel", given: Any) -> TrainedPart:
    """The part given, as a folder or a `TrainedPart`, or the one that comes with the embedded model.

    Raises ValueError when there is none, when it is of another kind, was made for a model of other sizes, or its
    weights or settings are not those of its kind.
    """
    if given is None:
        if lm.path != find_folder(None):
            raise ValueError(
                f"strategy {kind!r} needs a part trained for {lm.path.name}: pass draft=FOLDER "
                f"(`decodax train {kind}` makes one)"
            )
        given = lm.path / kind
    if not isinstance(given, TrainedPart):
        given = folder_name("draft", given, f" (for strategy {kind!r})")
        given = read_part(given, jax.tree.leaves(lm.params)[0].dtype)
    if given.kind != kind:
        raise ValueError(
            f"strategy {kind!r} needs a part of that kind, {given.label} holds {printable(repr(given.kind))}"
        )
    sizes = (
        ("hidden_size", lm.config.hidden_size, "hidden size"),
        ("vocab_size", lm.config.vocab_size, "vocabulary"),
        ("layers", lm.config.num_layers, "number of layers"),
    )
    for name, wanted, word in sizes:
        found = given.facts.get(f"target_{name}", wanted)
        if found != wanted:
            raise ValueError(
                f"{given.label} was made for a model whose {word} is {printable(found)}, and that of {lm.path.name} is "
                f"{wanted}: train one for this model with `decodax train {kind}`"
            )
    check_part(given.label, kind, given.shape, given.params, lm)
    return given
