"""A small trained part of a strategy as a folder: `part.json` says what it is, `part.safetensors` holds its weights.

Parts that are whole language models (a draft) are Hugging Face folders instead; all others are read and written here,
and checked against the model that they shall serve.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from decodax.arguments import folder_name
from decodax.models.load import find_folder
from decodax.models.model import Params

if TYPE_CHECKING:
    from decodax.models.load import LanguageModel

PART_FILE, WEIGHTS_FILE = "part.json", "part.safetensors"


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
    def shape(self) -> dict[str, Any]:
        return self.facts["about"]["shape"]

    def measured(self, name: str) -> Any:
        """What was measured under this name on the text to choose by, or else on held-out text, or else published.

        What was published may have been measured for another model. Raises ValueError where there is nothing.
        """
        for text in ("calibration", "heldout", "published"):
            if name in self.facts.get(text, {}):
                return self.facts[text][name]
        raise ValueError(
            f"{self.name or 'the part'} does not say its {name}, by which a draft is chosen: make a drafter by hand, "
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
    """Reads a part's folder; floating weights become `dtype`.

    Raises FileNotFoundError where there is none, ValueError where it cannot be read.
    """
    path = Path(folder).expanduser()
    if not (path / PART_FILE).is_file():
        raise FileNotFoundError(f"{path} holds no {PART_FILE}: give the folder that `decodax train` wrote")
    try:
        facts = json.loads((path / PART_FILE).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS_FILE)
        kind = facts.pop("kind")
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a trained part: {error!r}") from error
    params: Params = {}
    for name, array in tensors.items():
        *nodes, leaf = name.split(".")
        subtree = params
        for node in nodes:
            subtree = subtree.setdefault(node, {})
        subtree[leaf] = jnp.asarray(array).astype(dtype)
    return TrainedPart(kind, params, facts, path.name)


def find_part(kind: str, lm: "LanguageModel", given: Any) -> TrainedPart:
    """The part given, as a folder or a `TrainedPart`, or the one that comes with the embedded model.

    Raises ValueError when there is none, when it is of another kind, or was made for a model of other sizes.
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
        raise ValueError(f"strategy {kind!r} needs a part of that kind, {given.name} holds {given.kind!r}")
    sizes = (
        ("hidden_size", lm.config.hidden_size, "hidden size"),
        ("vocab_size", lm.config.vocab_size, "vocabulary"),
        ("layers", lm.config.num_layers, "number of layers"),
    )
    for name, wanted, word in sizes:
        found = given.facts.get(f"target_{name}", wanted)
        if found != wanted:
            raise ValueError(
                f"{given.name} was made for a model whose {word} is {found}, and that of {lm.path.name} is {wanted}: "
                f"train one for this model with `decodax train {kind}`"
            )
    return given
