"""Trains the embedded model on the standard library's source, and writes it as a Hugging Face folder.

    python -m decodax.scripts.train_demo train                     # the same command resumes an interrupted run
    python -m decodax.scripts.train_demo train --finish-by 1500    # resume, and let the learning rate fall earlier
    python -m decodax.scripts.train_demo export                    # newest checkpoint -> models/demo
    python -m decodax.scripts.train_demo evaluate                  # beside xz and an n-gram model; samples

About two hours on two cores. Everything random follows from the plan's seed and the step, so an interrupted run ends
with the same weights as an uninterrupted one.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from decodax.decoding.training.checkpoint import load_trained, read_progress
from decodax.decoding.training.export import write_json, write_model
from decodax.decoding.training.loop import train
from decodax.decoding.training.loss_curve import draw_loss
from decodax.decoding.training.text_windows import cut
from decodax.models.configs.hf_config import read_config
from decodax.models.model import Model
from decodax.scripts import demo_corpus, demo_evaluation, demo_tokenizer
from decodax.scripts.demo_corpus import Document
from decodax.scripts.demo_trainer import Params, Plan, make_task, text_windows

ROOT = Path(__file__).resolve().parents[1]
DEMO_FOLDER = ROOT / "models" / "demo"
RUN_FOLDER = ROOT / "runs" / "demo"
LOSS_IMAGE = ROOT / "docs" / "images" / "demo_loss.png"
RESULT_FILE = ROOT / "benchmarks" / "results" / "demo_model.json"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": demo_tokenizer.VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
GENERATION_CONFIG = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False}
SAMPLE_PROMPTS = ("def fibonacci(n):", "class Stack:\n    def __init__(self", "import os\nimport sys\n\ndef main(")


def functions(config: dict[str, Any] = CONFIG) -> tuple[Model, Callable, Callable]:
    """The model of a Hugging Face config, with its forward and head for the trainer."""
    model = Model(read_config(config)[1])

    def forward(params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return model.apply(params, tokens, position).hidden

    return model, forward, model.logits


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[np.ndarray]:
    """Token ids of each document, without separators."""
    texts = [document.text for document in documents]
    return [np.asarray(row.ids, np.int32) for row in tokenizer.encode_batch(texts, add_special_tokens=False)]


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """The documents that are code, and those that are tests."""
    return [d for d in documents if not d.is_test], [d for d in documents if d.is_test]


def run_tokenizer(folder: Path, code: list[Document], tests: list[Document]) -> Tokenizer:
    """The run's tokenizer; the first call trains it, on the training split's code and a quarter of its tests."""
    file = folder / "tokenizer.json"
    if not file.exists():
        texts = [document.text for document in code + tests[::4]]
        demo_tokenizer.save(demo_tokenizer.train(texts), folder, CONFIG["max_position_embeddings"])
    return Tokenizer.from_file(str(file))


def run_training(folder: Path, plan: Plan, finish_by: int | None) -> None:
    """Collects the text, trains (or resumes, under the run's own plan) and draws the loss curve."""
    progress = read_progress(folder)
    if progress is not None:
        plan = Plan(**progress.plan)
        print(f"resuming at step {progress.step} of {plan.steps}", flush=True)
    if finish_by is not None:
        plan = plan.finishing_by(finish_by, progress.step if progress else 0)
    corpus = demo_corpus.collect()
    code, tests = split(corpus.train)
    tokenizer = run_tokenizer(folder, code, tests)
    code_ids, test_ids = encode(tokenizer, code), encode(tokenizer, tests)
    stream = np.concatenate([np.append(0, ids) for ids in encode(tokenizer, split(corpus.heldout)[0])]).astype(np.int32)
    heldout = cut(stream, plan.short_tokens)
    heldout = heldout[np.random.default_rng(0).permutation(len(heldout))[:64]]
    model, forward, head = functions()
    params = model.init(jax.random.key(plan.seed))
    rows = text_windows(code_ids, test_ids, plan)
    train(folder, plan, make_task((forward, head, params), rows.at, heldout), checkpoint_seconds=300.0)
    draw_loss(folder / "log.jsonl", LOSS_IMAGE, title="Training the embedded model")


def export(run: Path, folder: Path) -> None:
    """Writes the run's newest checkpoint in bfloat16, with Hugging Face's names and files.

    Raises FileNotFoundError when the run has no checkpoint yet.
    """
    write_model(folder, CONFIG, load_trained(run), "bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    write_json(folder / "generation_config.json", GENERATION_CONFIG)


def load_exported(folder: Path) -> tuple[Params, Tokenizer]:
    """Float32 parameters and tokenizer of an exported folder."""
    family, config = read_config(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    params: Params = {}
    for name, path in family.tensor_names(config).items():
        subtree = params
        for key in path[:-1]:
            subtree = subtree.setdefault(key, {})
        subtree[path[-1]] = jnp.asarray(tensors[name].astype(np.float32))
    return params, Tokenizer.from_file(str(folder / "tokenizer.json"))


def evaluate(folder: Path, result: Path) -> dict[str, Any]:
    """Bits per byte of the exported model and of the baselines on the held-out code; writes and returns the table."""
    params, tokenizer = load_exported(folder)
    corpus = demo_corpus.collect()
    heldout = split(corpus.heldout)[0]
    _, forward, head = functions()
    context = CONFIG["max_position_embeddings"]
    ids = encode(tokenizer, heldout)
    bits = {
        "embedded model": demo_evaluation.model_bits(
            lambda params, tokens: head(params, forward(params, tokens)), params, ids, context=context
        )
    }
    # The code comes last, nearest to the held-out text: xz refers to it most cheaply.
    code, tests = split(corpus.train)
    bits |= demo_evaluation.baseline_bits(
        tests + code, heldout, lambda documents: encode(tokenizer, documents), vocabulary=CONFIG["vocab_size"]
    )
    size = sum(len(document.text.encode()) for document in heldout)
    tokens = sum(map(len, ids))
    table = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "heldout_bytes": size,
        "heldout_tokens": tokens,
        "bytes_per_token": size / tokens,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "bits_per_byte": {name: value / size for name, value in bits.items()},
        "corpus": demo_corpus.summary(corpus),
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(table, indent=2) + "\n")
    return table


def sample(folder: Path, prompts: tuple[str, ...], new_tokens: int = 80) -> list[str]:
    """Continuations of prompts: a greedy one, and one sampled at temperature 0.7."""
    import decodax

    lm = decodax.load(folder)
    settings: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.95, "seed": 0})
    texts = []
    for setting in settings:
        result = decodax.generate(lm, list(prompts), max_new_tokens=new_tokens, **setting)
        texts += [f"{prompt}{text}" for prompt, text in zip(prompts, result.text, strict=True)]
    return texts


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; every number of the plan is an option."""
    parser = argparse.ArgumentParser(description="Trains, exports and evaluates the embedded model.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "export", "evaluate"):
        command = commands.add_parser(name)
        command.add_argument("--run", type=Path, default=RUN_FOLDER, help="working folder (default: %(default)s)")
        command.add_argument("--model", type=Path, default=DEMO_FOLDER, help="exported folder (default: %(default)s)")
    command = commands.choices["train"]
    command.add_argument("--finish-by", type=int, help="a new last step for a run that is not finished")
    for field in fields(Plan):
        if field.name not in ("decay_from", "long_from"):
            command.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = parser.parse_args(arguments)
    if options.command == "train":
        chosen = {f.name: getattr(options, f.name) for f in fields(Plan) if hasattr(options, f.name)}
        run_training(options.run, Plan(**chosen).finishing_by(options.steps), options.finish_by)
    elif options.command == "export":
        export(options.run, options.model)
        print(f"wrote {options.model}")
    else:
        print(json.dumps(evaluate(options.model, RESULT_FILE), indent=2))
        for text in sample(options.model, SAMPLE_PROMPTS):
            print("-" * 80, text, sep="\n")


if __name__ == "__main__":
    main()
