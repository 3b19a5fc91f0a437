"""Holds the texts of a training run, training, held-out and calibration documents, and splits them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from decodax.decoding.training.text_windows import cut

MAX_HELDOUT_WINDOWS = 64


@dataclass(frozen=True)
class Texts:
    """Token ids to train on and to measure on.

    train: documents that every pass reads.
    heldout: documents never trained on.
    rotating: documents of which each pass reads another share, `rotating_share`.
    separator: the ids before every document.
    calibration: never trained on either, and most like what will be decoded (a model's own text); what a strategy
        chooses by is measured there, and on `heldout` where there is none.
    """

    train: Sequence[np.ndarray]
    heldout: Sequence[np.ndarray]
    rotating: Sequence[np.ndarray] = ()
    rotating_share: float = 0.0
    separator: tuple[int, ...] = ()
    calibration: Sequence[np.ndarray] = ()

    def heldout_windows(self, size: int) -> Int[np.ndarray, "W T_plus_1"]:
        """Windows of held-out text, spread evenly over it where there are more than MAX_HELDOUT_WINDOWS."""
        return self._windows(self.heldout, size)

    def calibration_windows(self, size: int) -> Int[np.ndarray, "W T_plus_1"]:
        """The same of the calibration text."""
        return self._windows(self.calibration, size)

    def _windows(self, documents: Sequence[np.ndarray], size: int) -> Int[np.ndarray, "W T_plus_1"]:
        stream = np.concatenate([np.concatenate([self.separator, ids]) for ids in documents]).astype(np.int32)
        try:
            windows = cut(stream, size)
        except ValueError as error:
            raise ValueError(f"too little text is held out: {error}. Give more text or shorter windows") from error
        count = min(MAX_HELDOUT_WINDOWS, len(windows))
        return windows[np.arange(count) * len(windows) // count]

    def fingerprint(self) -> str:
        """Tells one collection of texts from another."""
        digest = hashlib.sha256(repr((self.rotating_share, self.separator)).encode())
        for documents in (self.train, self.heldout, self.rotating, self.calibration):
            digest.update(len(documents).to_bytes(8, "little"))
            for ids in documents:
                digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, np.int32).tobytes())
        return digest.hexdigest()[:16]


def hold_out(documents: Sequence[np.ndarray], share: float, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Documents to train on, and documents held out: the last `share` of the tokens, documents in random order.

    One document is cut where the share begins.
    """
    order = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
    ends = np.cumsum([len(ids) for ids in order])
    border = int(ends[-1] * (1 - share))
    train, heldout = [], []
    for ids, end in zip(order, ends, strict=True):
        inside = max(0, len(ids) - max(0, int(end) - border))
        train += [ids[:inside]] if inside else []
        heldout += [ids[inside:]] if inside < len(ids) else []
    return train, heldout
