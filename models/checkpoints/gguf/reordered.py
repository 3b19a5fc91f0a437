"""Puts the numbers of GGUF tensors in Hugging Face's order, row by row.

llama.cpp stores some tensors in another order: heads with the two halves of each rotated pair side by side, the experts
of a layer in one tensor, the scale of a norm with its 1 added. The classes here undo that; each wraps a stored tensor
and is one.
"""

import mmap
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from decodax.models.checkpoints.gguf.block_types import PLAIN
from decodax.models.checkpoints.gguf.tensors import Index


@dataclass(frozen=True, eq=False)
class _Wrapper:
    """A tensor made from another."""

    base: Any

    @property
    def kind(self) -> str:
        return self.base.kind

    @property
    def label(self) -> str:
        return self.base.label

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    @property
    def mappings(self) -> tuple[mmap.mmap, ...]:
        return self.base.mappings


@dataclass(frozen=True, eq=False)
class _Pair(_Wrapper):
    """A tensor made from two, whose numbers may be of different kinds."""

    other: Any

    @property
    def kind(self) -> str:
        return self.base.kind if self.base.kind == self.other.kind else "F32"  # holds all numbers of any kind exactly

    @property
    def label(self) -> str:
        return f"{self.base.label} with {self.other.label}"

    @property
    def dtype(self) -> np.dtype:
        return PLAIN[self.kind]

    @property
    def mappings(self) -> tuple[mmap.mmap, ...]:
        return (*self.base.mappings, *self.other.mappings)


@dataclass(frozen=True, eq=False)
class HalvesOfHeads(_Wrapper):
    """Heads whose rotated pairs are (i, i + H/2), from a tensor whose pairs are (2 i, 2 i + 1).

    base: [heads x H, inputs], or a bias [heads x H].
    heads: how many.
    """

    heads: int

    @cached_property
    def _order(self) -> np.ndarray:
        """The index in the base of each index here: that of head h, half s, pair i is h H + 2 i + s."""
        size = self.shape[0]
        return np.arange(size).reshape(self.heads, size // self.heads // 2, 2).swapaxes(1, 2).reshape(size)

    def rows(self, index: Index) -> np.ndarray:
        if len(self.shape) == 1:  # one row, whose numbers change places
            return self.base.rows(index)[:, self._order]
        return self.base.rows(self._order[index])


@dataclass(frozen=True, eq=False)
class OneOfStack(_Wrapper):
    """A tensor [..] of a stack [E, ..] of them."""

    place: int

    @property
    def label(self) -> str:
        return f"{self.base.label}[{self.place}]"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape[1:]

    def rows(self, index: Index) -> np.ndarray:
        first = self.place * prod(self.shape[:-1])
        if isinstance(index, np.ndarray):
            return self.base.rows(index + first)
        start, stop, step = index.indices(prod(self.shape[:-1]))
        return self.base.rows(slice(first + start, first + max(start, stop), step))


@dataclass(frozen=True, eq=False)
class OneRow(_Wrapper):
    """A vector [D] as a matrix [1, D]."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.base.shape)

    def rows(self, index: Index) -> np.ndarray:
        return self.base.rows(index)


@dataclass(frozen=True, eq=False)
class LessOne(_Wrapper):
    """The scale of a norm that multiplies by 1 + weight, from 1 + weight."""

    def rows(self, index: Index) -> np.ndarray:
        numbers = self.base.rows(index)
        return numbers - numbers.dtype.type(1)


@dataclass(frozen=True, eq=False)
class Alternating(_Pair):
    """Two tensors [E, F, ..] or [E, F] as one of twice as many, which alternate along F: base, other, base, ...

    base: the first.
    other: of the same shape.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.base.shape[0], 2 * self.base.shape[1], *self.base.shape[2:])

    @staticmethod
    def fit(base: Any, other: Any) -> bool:
        """Whether two tensors can alternate."""
        return base.shape == other.shape and len(base.shape) > 1

    def rows(self, index: Index) -> np.ndarray:
        if len(self.shape) == 2:
            pair = np.stack([self.base.rows(index), self.other.rows(index)], axis=-1)
            return pair.reshape(-1, self.shape[-1])
        numbers = np.arange(*index.indices(prod(self.shape[:-1]))) if isinstance(index, slice) else index
        place, odd = np.divmod(numbers, 2)
        rows = np.empty((len(numbers), self.shape[-1]), self.dtype)
        for parity, tensor in enumerate((self.base, self.other)):
            chosen = odd == parity
            if chosen.any():
                rows[chosen] = tensor.rows(place[chosen])
        return rows


@dataclass(frozen=True, eq=False)
class KeysAndValues(_Pair):
    """The matrix [N (K + V), R] that makes keys and values of N heads from a latent of size R, head after head.

    base: the keys' part [N, R, K], transposed in each head.
    other: the values' part [N, V, R].
    """

    @property
    def shape(self) -> tuple[int, ...]:
        heads, latent, key = self.base.shape
        return (heads * (key + self.other.shape[1]), latent)

    @staticmethod
    def fit(base: Any, other: Any) -> bool:
        """Whether two tensors are such parts."""
        is_pair = len(base.shape) == len(other.shape) == 3
        return is_pair and base.shape[0] == other.shape[0] and base.shape[1] == other.shape[2]

    def rows(self, index: Index) -> np.ndarray:
        (_, latent, key), value = self.base.shape, self.other.shape[1]
        numbers = np.arange(*index.indices(self.shape[0])) if isinstance(index, slice) else index
        head, inner = np.divmod(numbers, key + value)
        rows = np.empty((len(numbers), latent), self.dtype)
        of_values = inner >= key
        rows[of_values] = self.other.rows((head * value + inner - key)[of_values])
        for one in np.unique(head[~of_values]):  # few: a piece has some rows of some heads
            chosen = ~of_values & (head == one)
            rows[chosen] = self.base.rows(slice(one * latent, (one + 1) * latent)).T[inner[chosen]]
        return rows
