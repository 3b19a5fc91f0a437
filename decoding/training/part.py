"""A training run of any small part for a model: from texts to a folder that says what it holds and how good it is.

A kind of part is a subclass: how it starts, what its loss is, how it is judged and written. Checkpoints, resuming, the
log, the loss curve, and the refusal to overwrite what is something else are the same for all.
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

from decodax.decoding.trained_part import PART_FILE, TrainedPart, write_part
from decodax.decoding.training.extra import need
from decodax.decoding.training.loop import MOVABLE, Task, Trained, train
from decodax.decoding.training.loss_curve import draw_loss
from decodax.decoding.training.plan import Plan
from decodax.decoding.training.text_windows import TextWindows
from decodax.decoding.training.texts import Texts
from decodax.models.load import LanguageModel
from decodax.models.model import Params
from decodax.models.model_files import find_file, read_json_object

_STAGED = ".being_written"  # inside a part's folder: what is not complete yet


@dataclass(frozen=True)
class PartTraining:
    """One run: the target, what to train (`shape`, a frozen dataclass of plain values), the plan, the texts.

    run: the folder that keeps its checkpoints and its log.
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
    facts_file: ClassVar[str] = PART_FILE

    def __post_init__(self) -> None:
        context = self.target.config.max_position_embeddings
        if self.plan.window_tokens > context:
            raise ValueError(f"windows hold {self.plan.window_tokens} tokens, the target's context is {context}")

    def initial(self) -> Params:
        """The part at step 0."""
        raise NotImplementedError

    def frozen(self) -> Any:
        """What `loss` reads and nothing changes: the target's parameters, and whatever else a kind of part needs."""
        return self.target.params

    def loss(
        self, trained: Params, target_params: Params, rows: Int[Array, "B T_plus_1"], step: Int[Array, ""]
    ) -> Float[Array, ""]:
        """The mean loss of a step's rows; `step` makes its random numbers."""
        raise NotImplementedError

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"]) -> dict[str, Any]:
        """What the part is worth on held-out windows, as JSON values; the single numbers among them go into the log.

        `heldout_loss` is drawn beside the training's loss.
        """
        raise NotImplementedError

    def derived(self, heldout: dict[str, Any]) -> dict[str, Any]:
        """Further facts that follow from what was measured."""
        return {}

    def write(self, folder: Path, trained: Params, facts: dict[str, Any], dtype: str) -> None:
        """Writes the part's folder, rounded to `dtype`."""
        write_part(folder, TrainedPart(self.kind, trained, facts), dtype)

    def about(self) -> dict[str, Any]:
        """What a resumed run must agree with, beside the plan."""
        target = hashlib.sha256(
            np.asarray(self.target.model.unstacked(self.target.params)["embedding"], np.float32).tobytes()
        ).hexdigest()[:16]
        return {"shape": asdict(self.shape), "target": target, "text": self.texts.fingerprint()}

    def train(self, **timing: Any) -> Trained:
        """Trains, or goes on where the run's last checkpoint stands; `timing` are the options of `loop.train`.

        The log's numbers on held-out text are those of windows of `short_tokens` throughout, to be compared.
        """
        need("matplotlib")  # draws the loss in the end: better missed now
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
        """Writes the part's folder, no file of it before all are complete, then the loss curve; returns the facts.

        What was measured is that of the rounded weights, on windows as long as the plan's longest.
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
        shutil.rmtree(staged, ignore_errors=True)  # of a run that was interrupted
        self.write(staged, params, facts, dtype)
        _put_in_place(staged, folder, last=self.facts_file)
        shares = dict(self.curve_shares)
        draw_loss(self.run / "log.jsonl", image, title=self.curve_title, unit=self.curve_unit, shares=shares)
        return facts

    def _calibration(self, rounded: Params) -> dict[str, Any]:
        """What was measured on the text to choose by, where there is some."""
        if not self.texts.calibration:
            return {}
        return {"calibration": self.measure(rounded, self.texts.calibration_windows(self.plan.short_tokens))}

    def refuse_foreign(self, folder: Path) -> None:
        """Raises ValueError when the folder holds something else than this part, or files of another kind."""
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
    """Moves complete files from `staged` to where they belong in `folder`, the one that says what they are at the end.

    Interrupted on the way, `staged` still says so, and the same training goes on.
    """
    files = sorted((file for file in staged.rglob("*") if file.is_file()), key=lambda file: file.name == last)
    for file in files:
        place = folder / file.relative_to(staged)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(staged)
