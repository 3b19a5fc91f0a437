"""Trains auxiliary weights of any kind for a model: from texts to a folder with the weights and their measures.

Each kind of auxiliary weights is a subclass: its initial parameters, loss, measures and files. Checkpoints, resuming,
the log, the loss curve, and the refusal to overwrite other files are the same for all.
"""

import datetime
import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decodax.decoding.auxiliary_weights import FACTS_FILE, AuxiliaryWeights, write_auxiliary_weights
from decodax.decoding.training.extra import need
from decodax.decoding.training.loop import MOVABLE, Task, Trained, train
from decodax.decoding.training.loss_curve import draw_loss
from decodax.decoding.training.plan import Plan
from decodax.decoding.training.text_windows import TextWindows
from decodax.decoding.training.texts import Texts
from decodax.models.checkpoints.model_files import find_file, read_json_object
from decodax.models.load import LanguageModel
from decodax.models.model import Params

_STAGED = ".being_written"  # inside the output folder: files that are not complete yet


@dataclass(frozen=True)
class AuxiliaryTraining:
    """One training run.

    target: the model that the weights are trained for.
    shape: what to train, a frozen dataclass of plain values.
    plan, texts: how to train, and on what.
    run: the folder of its checkpoints and its log.
    """

    target: LanguageModel
    shape: Any
    plan: Plan
    texts: Texts
    run: Path

    kind: ClassVar[str]
    curve_title: ClassVar[str]
    curve_unit: ClassVar[str] = "nats"
    curve_shares: ClassVar[Mapping[str, str]] = {}
    facts_file: ClassVar[str] = FACTS_FILE

    def __post_init__(self) -> None:
        context = self.target.config.max_position_embeddings
        if self.plan.window_tokens > context:
            raise ValueError(
                f"window_tokens must be at most {context} (the target's context), got {self.plan.window_tokens}"
            )

    def initial(self) -> Params:
        """The weights at step 0."""
        raise NotImplementedError

    def frozen(self) -> Any:
        """What `loss` reads and nothing changes: the target's parameters, and others that a kind needs."""
        return self.target.params

    def loss(
        self, trained: Params, target_params: Params, rows: Int[Array, "B T_plus_1"], step: Int[Array, ""]
    ) -> Float[Array, ""]:
        """The mean loss of a step's rows; its random numbers follow from `step`."""
        raise NotImplementedError

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"]) -> dict[str, Any]:
        """The measures on held-out windows, as JSON values; the single numbers among them go into the log.

        `heldout_loss` is drawn beside the training loss.
        """
        raise NotImplementedError

    def derived(self, heldout: dict[str, Any]) -> dict[str, Any]:
        """Further facts that follow from the measures."""
        return {}

    def write(self, folder: Path, trained: Params, facts: dict[str, Any], dtype: str) -> None:
        """Writes the folder, with the weights rounded to `dtype`."""
        write_auxiliary_weights(folder, AuxiliaryWeights(self.kind, trained, facts), dtype)

    def about(self) -> dict[str, Any]:
        """What a resumed run must agree with, besides the plan."""
        target = hashlib.sha256(
            np.asarray(self.target.model.unstacked(self.target.params)["embedding"], np.float32).tobytes()
        ).hexdigest()[:16]
        return {"shape": asdict(self.shape), "target": target, "text": self.texts.fingerprint()}

    def train(self, **timing: Any) -> Trained:
        """Trains, or resumes from the run's last checkpoint; `timing` are the options of `loop.train`.

        All held-out numbers of the log are measured on windows of `short_tokens`, so that they can be compared.
        """
        need("matplotlib")  # draws the loss at the end: a missing package is told now
        plan, texts = self.plan, self.texts
        windows = texts.heldout_windows(plan.short_tokens)

        def measure(params: Params) -> dict[str, float]:
            return {name: value for name, value in self.measure(params, windows).items() if isinstance(value, float)}

        rows = TextWindows(
            texts.train,
            plan,
            rotating=texts.rotating,
            rotating_share=texts.rotating_share,
            separator=texts.separator,
        )
        task = Task(self.loss, self.initial(), rows.at, self.frozen(), measure, self.about())
        return train(self.run, plan, task, **timing)

    def export(
        self, folder: Path, params: Params, step: int, image: Path, *, dtype: str = "bfloat16"
    ) -> dict[str, Any]:
        """Writes the folder once all its files are complete, then the loss curve; returns the facts.

        The measures are those of the rounded weights, on windows as long as the plan's longest.
        """
        rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype).astype(jnp.float32), params)
        config = self.target.config
        heldout = self.measure(rounded, self.texts.heldout_windows(self.plan.window_tokens))
        facts = {
            "target_vocab_size": config.vocab_size,
            "target_hidden_size": config.hidden_size,
            "target_layers": config.num_layers,
            "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "trained_tokens": step * self.plan.tokens_per_step,
            "heldout": heldout,
            **self.derived(heldout),
            **self._calibration(rounded),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "plan": asdict(self.plan),
            "about": self.about(),
        }
        staged = folder / _STAGED
        shutil.rmtree(staged, ignore_errors=True)  # of an interrupted run
        self.write(staged, params, facts, dtype)
        _put_in_place(staged, folder, last=self.facts_file)
        shares = dict(self.curve_shares)
        draw_loss(self.run / "log.jsonl", image, title=self.curve_title, unit=self.curve_unit, shares=shares)
        return facts

    def _calibration(self, rounded: Params) -> dict[str, Any]:
        """The measures on the calibration text, where there is some."""
        if not self.texts.calibration:
            return {}
        return {"calibration": self.measure(rounded, self.texts.calibration_windows(self.plan.short_tokens))}

    def refuse_foreign(self, folder: Path) -> None:
        """Raises ValueError when the folder holds other weights than this run's, or files of another kind."""
        if not folder.exists():
            return
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file: give a folder to write to")
        if not {file.name for file in folder.iterdir()} - {_STAGED}:
            return
        file = find_file(folder, self.facts_file) or find_file(folder, f"{_STAGED}/{self.facts_file}")
        facts = {} if file is None else read_json_object(file)
        plan = facts.get("plan")
        plan = plan if isinstance(plan, dict) else {}
        own = {name: value for name, value in asdict(self.plan).items() if name not in MOVABLE}
        stored = {name: value for name, value in plan.items() if name not in MOVABLE}
        if facts.get("about") != self.about() or stored != own:
            raise ValueError(f"{folder} already holds another model or other files: choose another folder, or empty it")


def _put_in_place(staged: Path, folder: Path, *, last: str) -> None:
    """Moves complete files from `staged` to their places in `folder`, `last` (the facts) after all others.

    After an interruption `staged` still holds the facts, and the same training can resume.
    """
    files = sorted((file for file in staged.rglob("*") if file.is_file()), key=lambda file: file.name == last)
    for file in files:
        place = folder / file.relative_to(staged)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(staged)
