"""Trains auxiliary weights for the embedded model, and writes their folder beside the model.

    python -m decodax.scripts.train_demo_auxiliary ppd                # the same command resumes an interrupted run
    python -m decodax.scripts.train_demo_auxiliary medusa --steps 600
    python -m decodax.scripts.train_demo_auxiliary first_gates && python -m decodax.scripts.train_demo_auxiliary first

The functions are those of `decodax train`. Only the text differs: the split on which the embedded model was trained and
evaluated, so that the packages held out there are held out here too, and text that the model itself wrote from pieces
of the training split, half of it greedily, half at temperature 0.8. Every kind reads the same text, and as much of it.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from decodax.decoding.auxiliary_weights import read_auxiliary_weights
from decodax.decoding.training.auxiliary import AuxiliaryTraining
from decodax.decoding.training.exit_predictors import ExitPredictorShape, ExitPredictorTraining
from decodax.decoding.training.kangaroo import KangarooShape, KangarooTraining
from decodax.decoding.training.layer_skip import LayerSkipShape, LayerSkipTraining
from decodax.decoding.training.loop import resumed_plan
from decodax.decoding.training.medusa import MedusaShape, MedusaTraining
from decodax.decoding.training.plan import Plan
from decodax.decoding.training.prompt_tokens import PromptTokensShape, PromptTokensTraining
from decodax.decoding.training.routed_layers import (
    LayerGateTraining,
    RoutedChangeShape,
    RoutedChangeTraining,
    RoutedShape,
)
from decodax.decoding.training.self_distillation import self_distilled
from decodax.decoding.training.skip_decode import SkipDecodeShape, SkipDecodeTraining
from decodax.decoding.training.texts import Texts
from decodax.models.load import LanguageModel, load
from decodax.scripts.train_demo_draft import demo_texts

ROOT = Path(__file__).resolve().parents[1]
DEMO, RUNS, IMAGES = ROOT / "models" / "demo", ROOT / "runs", ROOT / "docs" / "images"
OWN_DOCUMENTS = 768  # written by the model at each temperature
GIVEN_SHARE = 0.1  # of the given text, in each pass over the model's own

CALIBRATION_DOCUMENTS = 48  # of the model's own, of either temperature, kept for choosing trees and exits

PLAN = Plan(windows_per_step=1, window_tokens=1024, short_tokens=256, weight_decay=0.0)
Make = Callable[[LanguageModel, Texts, Path], AuxiliaryTraining]


def maker(
    training: type[AuxiliaryTraining], shape: object, *, peak: float, optimizer: str = "adamw", **more: object
) -> Make:
    """Makes the training of one kind, with the shared plan at its own `peak` and `optimizer`."""
    plan = dataclasses.replace(PLAN, peak=peak, optimizer=optimizer)
    return lambda target, texts, run: training(target, shape, plan, texts, run, **more)


def exit_predictors(target: LanguageModel, texts: Texts, run: Path) -> AuxiliaryTraining:
    """Exit predictors with the draft of the embedded model."""
    draft = load(DEMO / "draft", dtype="float32")
    return maker(ExitPredictorTraining, ExitPredictorShape(), peak=3e-3, draft=draft)(target, texts, run)


def draft_prompts(target: LanguageModel, texts: Texts, run: Path) -> AuxiliaryTraining:
    """Prompt tokens for the draft of the embedded model, on the same texts."""
    draft = load(DEMO / "draft", dtype="float32")
    return maker(PromptTokensTraining, PromptTokensShape(), peak=0.1)(draft, texts, run)


def routed_layers(target: LanguageModel, texts: Texts, run: Path) -> AuxiliaryTraining:
    """The second stage, with the layer gates that the first one wrote into the folder of the runs."""
    layer_gates = read_auxiliary_weights(run.parent / "first_gates_weights", "float32")
    shape = RoutedChangeShape(**layer_gates.shape)
    return maker(RoutedChangeTraining, shape, peak=2e-3, layer_gates=layer_gates.params["layer_gates"])(
        target, texts, run
    )


KINDS: dict[str, Make] = {
    "ppd": maker(PromptTokensTraining, PromptTokensShape(), peak=0.1),
    "medusa": maker(MedusaTraining, MedusaShape(heads=4), peak=1e-2, optimizer="muon"),
    "kangaroo": maker(KangarooTraining, KangarooShape(exit_layer=1), peak=0.03, optimizer="muon"),
    "layer_skip": maker(LayerSkipTraining, LayerSkipShape(), peak=4e-3, optimizer="muon"),
    "specee": exit_predictors,
    "skip_decode": maker(SkipDecodeTraining, SkipDecodeShape(min_layers=4), peak=2e-3),
    "first_gates": maker(LayerGateTraining, RoutedShape(), peak=0.02),
    "first": routed_layers,
    "draft_ppd": draft_prompts,
}
# Weights that are not beside the embedded model under their kind's name: layer gates alone are only half of `first`.
FOLDERS = {"first_gates": RUNS / "first_gates_weights", "draft_ppd": DEMO / "draft" / "ppd"}


def own_text(target: LanguageModel, given: Sequence[np.ndarray], folder: Path) -> list[np.ndarray]:
    """Text that the model wrote from pieces of what it was trained on; written once, then read from the folder."""
    file = folder / "own_text.npz"
    if not file.exists():
        written = [
            ids
            for temperature in (0.0, 0.8)
            for ids in self_distilled(target, given, OWN_DOCUMENTS, temperature=temperature)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "own_text.tmp.npz"
        np.savez(temporary, ids=np.concatenate(written), lengths=np.array([len(ids) for ids in written]))
        temporary.replace(file)
    stored = np.load(file)
    return np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])


def training_texts(target: LanguageModel, runs: Path) -> Texts:
    """The model's own text in every pass, and another tenth of the given text."""
    given = demo_texts(target)
    documents = [*given.train, *given.rotating]
    own = own_text(target, documents, runs)
    apart = range(0, len(own), len(own) // CALIBRATION_DOCUMENTS)
    return dataclasses.replace(
        given,
        train=[ids for index, ids in enumerate(own) if index not in apart],
        rotating=documents,
        rotating_share=GIVEN_SHARE,
        calibration=[own[index] for index in apart],
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Trains and writes auxiliary weights of the embedded model.")
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--steps", type=int, default=320, help="of 1,024 tokens each (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="working folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the folder to write (default: the kind, beside the embedded model)")
    parser.add_argument("--image", type=Path, help="the loss curve (default: in docs/images)")
    options = parser.parse_args(arguments)
    target = load(dtype="float32")
    training = KINDS[options.kind](target, training_texts(target, options.runs), options.runs / options.kind)
    plan = resumed_plan(training.run, training.plan.finishing_by(options.steps))
    training = dataclasses.replace(training, plan=plan)
    out = options.out or FOLDERS.get(options.kind, DEMO / options.kind)
    image = options.image or IMAGES / f"{options.kind}_loss.png"
    training.refuse_foreign(out)
    trained = training.train()
    if not trained.finished:
        print(f"stopped at step {trained.step} of {plan.steps}; the same command goes on from there")
        return
    print(json.dumps(training.export(out, trained.params, trained.step, image), indent=2))


if __name__ == "__main__":
    main()
