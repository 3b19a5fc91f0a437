"""Stores checkpoints of a training run: one safetensors file, replaced atomically, and a log of JSON lines.

An interrupted run leaves the old checkpoint or the new one, never half of one.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far the run in a folder is.

    step: steps done.
    plan: the plan's fields.
    about: what else a resumed run must agree with.
    """

    step: int
    plan: dict[str, Any]
    about: dict[str, Any]


def save_checkpoint(folder: Path, step: int, plan: Mapping[str, Any], about: Mapping[str, Any], tree: Any) -> None:
    """Replaces the folder's checkpoint; `tree` holds all that the run needs to resume."""
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
    temporary = folder / "checkpoint.tmp"
    save_file(leaves, temporary, {"step": str(step), "plan": json.dumps(dict(plan)), "about": json.dumps(dict(about))})
    os.replace(temporary, folder / FILE)


def read_progress(folder: Path) -> Progress | None:
    """The progress that the folder's checkpoint tells, None without a checkpoint.

    Raises ValueError when the checkpoint is unreadable.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, "numpy") as opened:
            about = opened.metadata()
        return Progress(int(about["step"]), json.loads(about["plan"]), json.loads(about.get("about", "{}")))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no checkpoint of a training run: {error}") from error


def load_tree(folder: Path, like: Any) -> Any:
    """The tree of the folder's checkpoint in the structure of `like`.

    Raises ValueError when the checkpoint belongs to another model or optimizer.
    """
    file = folder / FILE
    leaves = load_file(file)
    paths, structure = jax.tree.flatten_with_path(like)
    expected = {jax.tree_util.keystr(path): leaf.shape for path, leaf in paths}
    found = {name: leaf.shape for name, leaf in leaves.items()}
    if expected != found:
        odd = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise ValueError(f"{file} belongs to another model or optimizer: {len(odd)} leaves differ, such as {odd[0]}")
    return jax.tree.unflatten(structure, [jnp.asarray(leaves[jax.tree_util.keystr(path)]) for path, _ in paths])


def load_trained(folder: Path) -> dict[str, Any]:
    """The trained parameters alone of the folder's checkpoint, as NumPy arrays.

    Raises FileNotFoundError when there is no checkpoint.
    """
    file = folder / FILE
    if not file.exists():
        raise FileNotFoundError(f"expected a checkpoint at {file}; train first")
    params: dict[str, Any] = {}
    for name, leaf in load_file(file).items():
        # A leaf of the saved pair (params, state) is called "[0]['blocks_0']['mixer']['query']".
        first, *path = [key.strip("'") for key in name[1:-1].split("][")]
        if first == "0":
            subtree = params
            for key in path[:-1]:
                subtree = subtree.setdefault(key, {})
            subtree[path[-1]] = leaf
    return params


@dataclass
class Log:
    """One JSON line per report in `log.jsonl`; lines after the checkpoint that is resumed from are removed.

    So is an incomplete line, as a process leaves it that ends while it writes.
    """

    file: Path
    step: int

    def __post_init__(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        kept = [line for line in lines if (step := _step_of(line)) is not None and step <= self.step]
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self.file)

    def write(self, entry: Mapping[str, int | float]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(dict(entry)) + "\n")


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return None
