"""Shared by trainings of layer policies: a target with a layer to skip, a short plan, texts of few distinct tokens."""

from dataclasses import replace

import numpy as np

from decodax.decoding.training.texts import Texts
from tests.decoding.training import small

LAYERS = 3
PLAN = replace(small.PLAN, steps=30, decay_from=20, long_from=30, peak=0.01, windows_per_step=5)
PROMPT = np.array([3, 1, 4, 1, 5, 9, 2], np.int32)


def deep_target():
    return small.target_of(LAYERS)


def documents(seed, count):
    """Texts in which few tokens follow any one, so that there is something to learn from few of them."""
    draw = np.random.default_rng(seed)
    steps = [draw.integers(1, 3, size=draw.integers(20, 40)) for _ in range(count)]
    return [(1 + np.cumsum(taken) % 11).astype(np.int32) for taken in steps]


TEXTS = Texts(documents(0, 11), documents(1, 5), separator=(0,))
