"""Shared by trainings of auxiliary weights: a short plan, a few texts of random tokens, targets of few layers."""

from pathlib import Path

import jax
import numpy as np

from decodax.decoding.training.plan import Plan
from decodax.decoding.training.texts import Texts
from decodax.models.configs.hf_config import read_config
from decodax.models.load import LanguageModel
from decodax.models.model import Model
from tests.tiny import TINY_LLAMA

WINDOW = 14
PLAN = Plan(
    steps=40,
    decay_from=30,
    long_from=40,
    peak=0.02,
    windows_per_step=3,
    window_tokens=WINDOW,
    short_tokens=WINDOW,
    optimizer="adamw",
    seed=2,
)


def documents(seed, count):
    """Texts of 20 to 39 tokens, of the whole vocabulary but the separator."""
    draw = np.random.default_rng(seed)
    return [draw.integers(1, 37, size=draw.integers(20, 40)).astype(np.int32) for _ in range(count)]


TEXTS = Texts(documents(0, 7), documents(1, 3), separator=(0,))


def target_of(num_layers):
    """Random weights, large enough that its distributions are far from uniform."""
    config = read_config(TINY_LLAMA | {"num_hidden_layers": num_layers})[1]
    params = jax.tree.map(lambda leaf: 1.5 * leaf, Model(config).init(jax.random.key(0)))
    return LanguageModel(Model(config), config, params, None, Path("tiny"), (0,))
