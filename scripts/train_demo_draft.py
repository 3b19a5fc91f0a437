"""Trains the draft model of the embedded model on the standard library, and writes it as a Hugging Face folder.

    python -m decodax.scripts.train_demo_draft                   # the same command resumes an interrupted run
    python -m decodax.scripts.train_demo_draft --steps 3000      # resume, with another last step

The functions are those of `decodax train draft`; only the text differs: the split on which the embedded model was
trained and evaluated, so that the packages held out there are held out here too. About an hour on two cores.
"""

import argparse
import json
from pathlib import Path

from decodax.decoding.training.draft import DraftShape, DraftTraining
from decodax.decoding.training.loop import resumed_plan
from decodax.decoding.training.plan import Plan
from decodax.decoding.training.texts import Texts
from decodax.models.load import LanguageModel, load
from decodax.scripts import demo_corpus
from decodax.scripts.train_demo import encode, split

ROOT = Path(__file__).resolve().parents[1]
DRAFT_FOLDER = ROOT / "models" / "demo" / "draft"
RUN_FOLDER = ROOT / "runs" / "draft"
LOSS_IMAGE = ROOT / "docs" / "images" / "draft_loss.png"
SHAPE = DraftShape(hidden_size=112, layers=2, heads=4, kv_heads=2, head_size=28, feed_forward=288)
PLAN = Plan(peak=1e-2, warmup=100, windows_per_step=4, window_tokens=1024, short_tokens=256)
TEST_SHARE = 0.25  # of the training split's test files, in each pass over the code


def demo_texts(target: LanguageModel) -> Texts:
    """The embedded model's own split: code and tests to train on, code of the held-out packages to measure on."""
    if target.tokenizer is None:
        raise ValueError(f"{target.path} has no tokenizer: the texts cannot be encoded")
    corpus = demo_corpus.collect()
    code, tests = split(corpus.train)
    heldout, _ = split(corpus.heldout)
    train_ids, test_ids, heldout_ids = (encode(target.tokenizer.backend, files) for files in (code, tests, heldout))
    return Texts(train_ids, heldout_ids, test_ids, TEST_SHARE, target.end_token_ids[:1])


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Trains and writes the draft model of the embedded model.")
    parser.add_argument("--steps", type=int, default=2250, help="of 4,096 tokens each (default: %(default)s)")
    parser.add_argument("--run", type=Path, default=RUN_FOLDER, help="working folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DRAFT_FOLDER, help="the draft's folder (default: %(default)s)")
    parser.add_argument("--image", type=Path, default=LOSS_IMAGE, help="the loss curve (default: %(default)s)")
    options = parser.parse_args(arguments)
    # In bfloat16 the target's forward, most of a step, took 0.7 of its time in float32 where this ran.
    target = load(dtype="bfloat16")
    plan = resumed_plan(options.run, PLAN.finishing_by(options.steps))
    training = DraftTraining(target, SHAPE, plan, demo_texts(target), options.run)
    training.refuse_foreign(options.out)
    trained = training.train()
    if not trained.finished:
        print(f"stopped at step {trained.step} of {plan.steps}; the same command goes on from there")
        return
    measured = DraftTraining(load(dtype="float32"), SHAPE, plan, training.texts, options.run)
    print(json.dumps(measured.export(options.out, trained.params, trained.step, options.image), indent=2))


if __name__ == "__main__":
    main()
