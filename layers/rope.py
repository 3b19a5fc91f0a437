"""Implements rotary position embedding (RoPE) and its published scalings to longer contexts.

RoFormer, arXiv 2104.09864: pair j of a head's coordinates (j and j + rotary_size / 2, Hugging Face's half-split order,
or the neighbours 2 j and 2 j + 1) is rotated by position x frequency_j, with frequency_j = base^(-2 j / rotary_size).
A scaling changes the frequencies:

| scaling  | source                                  | idea                                                        |
|----------|-----------------------------------------|-------------------------------------------------------------|
| linear   | Position Interpolation, arXiv 2306.15595 | all frequencies divided by a factor                        |
| dynamic  | NTK-aware, as in transformers            | a larger base once the row is longer than in training      |
| llama3   | Llama 3.1 release                        | only slow frequencies divided, with a smooth transition    |
| yarn     | YaRN, arXiv 2309.00071                   | a ramp between kept and divided, and scaled cos and sin    |
| longrope | LongRoPE, arXiv 2402.13753               | one searched factor per frequency, short and long lists    |
| proportional | Gemma 4 release                      | the first pairs rotate as ever, the others not at all      |

Dynamic and longrope depend on the length of the row. That length is an argument (`row_length`), because it does not
follow from the positions of one forward: a chunked prefill must rotate every chunk as the full prompt does. In
decoding each token's row ends with the token itself, as in transformers with a cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@runtime_checkable
class Scaling(Protocol):
    """Maps unscaled frequencies to scaled ones; `attention_factor` multiplies cos and sin."""

    @property
    def attention_factor(self) -> float: ...

    def frequencies(self, rope: "Rope", row_length: Int[Array, "B T"]) -> Float[Array, "... J"]:
        """Radians per position for each pair of coordinates: [J], or [B, T, J] when they depend on the row's length."""
        ...


@dataclass(frozen=True)
class Rope:
    """A rotation of each head.

    rotary_size: rotates the first `rotary_size` coordinates (the head size, unless the model rotates only some).
    base: of the frequencies.
    scaling: of the frequencies, None for none.
    interleaved: the pairs are neighbours, as in the weights of DeepSeek, GLM and Cohere.
    """

    rotary_size: int
    base: float
    scaling: Scaling | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.rotary_size % 2 or self.rotary_size <= 0:
            raise ValueError(f"rotary_size must be even and positive (coordinates), got {self.rotary_size}")

    @property
    def exponents(self) -> Float[np.ndarray, " J"]:
        """2 j / rotary_size for j = 0 .. rotary_size / 2 - 1."""
        return np.arange(0, self.rotary_size, 2, dtype=np.float32) / np.float32(self.rotary_size)

    @property
    def powers(self) -> Float[np.ndarray, " J"]:
        """base^(2 j / rotary_size), whose inverses are the unscaled frequencies, rounded where PyTorch rounds.

        One unit in the last place of a frequency is 0.006 radians at position 100,000, so the rounding that the models
        were trained with matters there: exponents and powers in float32, each correctly rounded, on every device.
        """
        return (np.float64(self.base) ** self.exponents.astype(np.float64)).astype(np.float32)

    def plain_frequencies(self) -> Float[np.ndarray, " J"]:
        """base^(-2 j / rotary_size)."""
        return np.float32(1) / self.powers

    def angles(
        self, position: Int[Array, "B T"], row_length: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T J"], Float[Array, "B T J"]]:
        """cos and sin of every pair's angle, in float32."""
        if self.scaling is None:
            frequencies, magnitude = jnp.asarray(self.plain_frequencies()), 1.0
        else:
            frequencies, magnitude = self.scaling.frequencies(self, row_length), self.scaling.attention_factor
        frequencies = frequencies if frequencies.ndim == 3 else frequencies[None, None, :]
        angle = position[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude

    def rotation(self, position: Int[Array, "B T"], row_length: Int[Array, "B T"]) -> Callable[[Array], Array]:
        """The function that rotates queries or keys [B, T, N, H] of tokens at these positions (`rotate`)."""
        cos, sin = self.angles(position, row_length)
        return partial(rotate, cos=cos, sin=sin, interleaved=self.interleaved)


def rotate(
    heads: Float[Array, "B T N H"],
    cos: Float[Array, "B T J"],
    sin: Float[Array, "B T J"],
    *,
    interleaved: bool = False,
) -> Float[Array, "B T N H"]:
    """Rotates coordinate pairs (j, j + J); coordinates from 2 J on pass unchanged. Computed in float32.

    heads: queries or keys.
    cos, sin: of the angles of J pairs.
    interleaved: the pairs are (2 j, 2 j + 1). The result has the half-split order, which changes no score as long as
        queries and keys agree.
    """
    half = cos.shape[-1]
    wide = heads.astype(jnp.float32)
    pairs, rest = wide[..., : 2 * half], wide[..., 2 * half :]
    first, second = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else (pairs[..., :half], pairs[..., half:])
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)


class _SameMagnitude:
    """A mix-in for scalings that change only frequencies."""

    @property
    def attention_factor(self) -> float:
        return 1.0


@dataclass(frozen=True)
class LinearScaling(_SameMagnitude):
    """All frequencies divided by `factor`. Position Interpolation, arXiv 2306.15595."""

    factor: float

    def frequencies(self, rope: Rope, row_length: Int[Array, "B T"]) -> Float[Array, " J"]:
        return jnp.asarray(rope.plain_frequencies() / np.float32(self.factor))


@dataclass(frozen=True)
class DynamicScaling(_SameMagnitude):
    """Beyond the original length the base grows: base (factor r - factor + 1)^(d / (d - 2)), r = length / original.

    "NTK-aware" scaling, which has no paper, as transformers computes it.

    factor: of the scaling.
    original_length: tokens of the training context.
    """

    factor: float
    original_length: int

    def frequencies(self, rope: Rope, row_length: Int[Array, "B T"]) -> Float[Array, "B T J"]:
        length = jnp.maximum(row_length, self.original_length).astype(jnp.float32)
        growth = self.factor * length / self.original_length - (self.factor - 1)
        base = rope.base * growth ** (rope.rotary_size / (rope.rotary_size - 2))
        stretched = 1.0 / base[..., None] ** rope.exponents[None, None, :]
        plain = rope.plain_frequencies()[None, None, :]
        return jnp.where(row_length[..., None] > self.original_length, stretched, plain)


@dataclass(frozen=True)
class Llama3Scaling(_SameMagnitude):
    """Wavelengths above original / low are divided by factor, below original / high kept, between: interpolated.

    From the release of Llama 3.1; not in its paper.

    factor: of the scaling.
    low_frequency_factor: low.
    high_frequency_factor: high.
    original_length: tokens of the training context.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def frequencies(self, rope: Rope, row_length: Int[Array, "B T"]) -> Float[Array, " J"]:
        plain = rope.plain_frequencies()
        turns = self.original_length * plain / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return jnp.asarray((1 - smooth) * plain / self.factor + smooth * plain)


@dataclass(frozen=True)
class YarnScaling:
    """Pairs that turn more than `beta_fast` times in the original length are kept, fewer than `beta_slow` divided.

    YaRN, arXiv 2309.00071.

    factor: of the scaling.
    original_length: tokens of the training context.
    attention_factor: multiplies cos and sin.
    beta_fast: turns above which a frequency is kept.
    beta_slow: turns below which a frequency is divided.
    truncate: the ramp's ends are rounded outward to integer pairs.
    """

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, rope: Rope, row_length: Int[Array, "B T"]) -> Float[Array, " J"]:
        size, half = rope.rotary_size, rope.rotary_size // 2

        def pair_turning(times: float) -> float:
            return size * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(rope.base))

        low, high = pair_turning(self.beta_fast), pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        width = (high - low) or 0.001
        divided = np.clip((np.arange(half, dtype=np.float32) - low) / width, 0.0, 1.0)
        kept = 1 - divided
        return jnp.asarray((1 - kept) / (np.float32(self.factor) * rope.powers) + kept / rope.powers)


@dataclass(frozen=True)
class LongRopeScaling:
    """Each frequency has its own divisor: `long_factor` for rows beyond `original_length`, else `short_factor`.

    LongRoPE, arXiv 2402.13753.

    short_factor: divisors of the J frequencies for short rows.
    long_factor: divisors of the J frequencies for long rows.
    original_length: tokens of the training context.
    attention_factor: multiplies cos and sin.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    attention_factor: float

    def frequencies(self, rope: Rope, row_length: Int[Array, "B T"]) -> Float[Array, "B T J"]:
        powers = rope.powers[None, None, :]
        short, long = (
            1 / (np.asarray(factor, np.float32)[None, None, :] * powers)
            for factor in (self.short_factor, self.long_factor)
        )
        return jnp.where(row_length[..., None] > self.original_length, long, short)


@dataclass(frozen=True)
class ProportionalScaling(_SameMagnitude):
    """Only the first pairs rotate, with the frequencies that they have where all do. From the release of Gemma 4.

    num_rotating: pairs that rotate.
    factor: divides their frequencies.
    """

    num_rotating: int
    factor: float = 1.0

    def frequencies(self, rope: Rope, row_length: Int[Array, "B T"]) -> Float[Array, " J"]:
        plain = rope.plain_frequencies()
        rotates = np.arange(len(plain)) < self.num_rotating
        return jnp.asarray(np.where(rotates, plain / np.float32(self.factor), np.float32(0)))


SCALINGS: dict[str, type[Scaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
    "proportional": ProportionalScaling,
}
