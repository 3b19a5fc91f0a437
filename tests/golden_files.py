"""Loads golden files: model folders with what `transformers` computed for them (scripts/make_golden.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One model folder and its expected results.

    tokens: [B, T], prompts of length[B], padded with 0.
    logits: float32 [B, T, V], of each prompt run alone, 0 where padded.
    generated: [B, 24], each prompt's greedy continuation; at every step the two largest logits differ by 2e-3 or more.
    """

    folder: Path
    tokens: np.ndarray
    length: np.ndarray
    logits: np.ndarray
    generated: np.ndarray


def golden_cases() -> list[str]:
    """Names of all cases."""
    return sorted(file.parent.name for file in _FOLDER.glob("*/golden.npz"))


def load_golden(name: str) -> Golden:
    """One case, for example "llama_yarn"."""
    folder = _FOLDER / name
    with np.load(folder / "golden.npz") as file:
        return Golden(folder, **{key: file[key] for key in ("tokens", "length", "logits", "generated")})


def logits_of(golden: Golden, lm: Any, params: Any) -> np.ndarray:
    """The logits of a model after every token of the prompts, float64 [B, T, V]; where padded they mean nothing."""
    tokens = jnp.asarray(golden.tokens, jnp.int32)
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    row_length = jnp.broadcast_to(jnp.asarray(golden.length, jnp.int32)[:, None], tokens.shape)

    @jax.jit
    def run(params, tokens):
        return lm.model.logits(params, lm.model.apply(params, tokens, position, row_length=row_length).hidden)

    return np.asarray(run(params, tokens), np.float64)
