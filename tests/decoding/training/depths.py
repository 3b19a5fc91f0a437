"""What the trainings of depths share: a target with a layer to leave out, a short plan, texts of a few words."""

from pathlib import Path

import jax
import numpy as np

from decodax.decoding.training.plan import Plan
from decodax.decoding.training.texts import Texts
from decodax.models.hf_config import read_config
from decodax.models.load import LanguageModel
from decodax.models.model import Model
from tests.tiny import TINY_LLAMA

LAYERS, WINDOW = 3, 14
PLAN = Plan(
    steps=30,
    decay_from=20,
    long_from=30,
    peak=0.01,
    windows_per_step=5,
    window_tokens=WINDOW,
    short_tokens=WINDOW,
    optimizer="adamw",
    seed=2,
)
PROMPT = np.array([3, 1, 4, 1, 5, 9, 2], np.int32)


def deep_target():
    """Three layers of random weights, large enough that its laws are far from uniform."""
    config = read_config(TINY_LLAMA | {"num_hidden_layers": LAYERS})[1]
    params = jax.tree.map(lambda leaf: 1.5 * leaf, Model(config).init(jax.random.key(0)))
    return LanguageModel(Model(config), config, params, None, Path("tiny"), (0,))


def documents(seed, count):
    """Texts in which few tokens follow any one, so that there is something to learn from few of them."""
    draw = np.random.default_rng(seed)
    steps = [draw.integers(1, 3, size=draw.integers(20, 40)) for _ in range(count)]
    return [(1 + np.cumsum(taken) % 11).astype(np.int32) for taken in steps]


TEXTS = Texts(documents(0, 11), documents(1, 5), separator=(0,))
