"""Compares a converted model with its source: every weight bit by bit, and the logits of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from decodax.api import load, logits
from decodax.models.checkpoints.conversion import open_source
from decodax.models.checkpoints.orbax_writing import chunk_regions, chunk_shape
from decodax.models.load import working_dtype

NUM_ROWS, NUM_TOKENS = 2, 32  # of random tokens


@dataclass(frozen=True)
class Verification:
    """What a comparison found.

    differing: names of the parameters whose numbers are not those of the source, rounded as the target's are.
    largest_logit_difference: of both sides run in the same type; 0 where the weights are the same.
    rounding_logit_difference: of the source's own weights and the target's, both run in float32: what rounding the
        weights changed; None where nothing was rounded.
    """

    differing: tuple[str, ...]
    largest_logit_difference: float
    rounding_logit_difference: float | None

    @property
    def is_same(self) -> bool:
        return not self.differing and self.largest_logit_difference == 0


def verify(
    source: str | Path,
    target: str | Path,
    *,
    dtype: DTypeLike | None = None,
    adapters: Sequence[Path] = (),
    seed: int = 0,
) -> Verification:
    """Compares a target with its source, one weight at a time, then the logits of random tokens, one model at a time.

    dtype: what the conversion rounded the weights to; None if nothing.
    adapters: folders of the LoRA adapters that the conversion merged into the source's weights.
    seed: of the random tokens.
    Raises what `decodax.load` raises for either.
    """
    differing = _differing(source, target, adapters)
    kind = None if dtype is None else working_dtype(dtype)
    opened = open_source(target)
    if adapters and kind is None:  # merging rounds as well, to what the target holds
        kind = working_dtype(opened.weights.dtype(("embedding",)))
    vocab_size = opened.config.vocab_size
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (NUM_ROWS, NUM_TOKENS))

    def difference(kind: DTypeLike | None) -> float:
        sides = ((source, adapters or None), (target, None))
        return _largest_difference(
            *(np.asarray(logits(load(side, dtype=kind, adapter=added), tokens)) for side, added in sides)
        )

    rounding = None if kind is None else difference(jnp.float32)
    return Verification(differing, difference(kind), rounding)


def _differing(source: str | Path, target: str | Path, adapters: Sequence[Path]) -> tuple[str, ...]:
    """The parameters whose bits are not the same, or that only one side has."""
    one, other = open_source(source, adapters).weights, open_source(target).weights
    names = ["/".join(path) for path in one.weights.keys() ^ other.weights.keys()]
    for path, weight in other.weights.items():
        if path not in one.weights:
            continue
        dtype = other.dtype(path)
        for _, region in chunk_regions(weight.shape, chunk_shape(weight.shape, dtype.itemsize)):
            if one.read(path, region, dtype).tobytes() != other.read(path, region, dtype).tobytes():
                names.append("/".join(path))
                break
    return tuple(names)


def _largest_difference(one: Float[np.ndarray, "B T V"], other: Float[np.ndarray, "B T V"]) -> float:
    """NaN on both sides is no difference, on one side an infinite one."""
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        differences = np.where(same, 0, np.abs(one - other))
    return float(np.where(np.isnan(differences), np.inf, differences).max())
