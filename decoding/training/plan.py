"""Defines the plan of a training run, from its first step to its last, as frozen data, with its learning rate.

The learning rate warms up, stays, and falls to zero over the last third (warmup-stable-decay, arXiv 2405.18392), so
that a run can finish earlier or later: only the fall moves.
"""

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class Plan:
    """The plan, stored with each checkpoint, so that a resumed run follows it.

    decay_from: step at which the learning rate begins to fall; `finishing_by` sets it.
    long_from: step at which the rows grow from `short_tokens` to `window_tokens`; `finishing_by` sets it.
    warmup: steps in which the rate rises, or a tenth of the run where that is less.
    long_share: how long before the end `finishing_by` sets `long_from`.
    optimizer: muon or adamw.

    >>> Plan(steps=100, decay_from=64, warmup=10, peak=0.5).learning_rate(4)
    0.25
    """

    steps: int = 2000
    decay_from: int = 1600
    long_from: int = 1700
    warmup: int = 100
    peak: float = 1e-2
    weight_decay: float = 0.1
    windows_per_step: int = 4
    window_tokens: int = 1024
    short_tokens: int = 256
    long_share: float = 0.35
    optimizer: str = "muon"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "warmup", "windows_per_step", "window_tokens", "short_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.long_share <= 1:
            raise ValueError(f"long_share must be in 0..1, got {self.long_share}")
        if not self.peak > 0:
            raise ValueError(f"the learning rate must be positive, got {self.peak}")
        if self.window_tokens % self.short_tokens:
            raise ValueError(
                f"window_tokens must be a multiple of short_tokens, got {self.window_tokens} and {self.short_tokens}"
            )
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"the optimizer must be muon or adamw, got {self.optimizer!r}")

    @property
    def tokens_per_step(self) -> int:
        return self.windows_per_step * self.window_tokens

    def finishing_by(self, steps: int, now: int = 0) -> Self:
        """The same run with another last step; the fall begins a third before it, the long rows by their share.

        Neither begins before step `now`.
        Raises ValueError when the run is already past that step.
        """
        if steps <= now:
            raise ValueError(f"the last step must be after the checkpoint's step {now}, got {steps}")
        long_from = round((1 - self.long_share) * steps)
        return replace(self, steps=steps, decay_from=max(now, int(0.65 * steps)), long_from=max(now, long_from))

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, the peak, then `1 - sqrt(progress)` down to zero at the last step."""
        rise = min(1.0, (step + 1) / min(self.warmup, max(1, self.steps // 10)))
        fall = max(0, step - self.decay_from) / max(1, self.steps - self.decay_from)
        return self.peak * rise * (1 - fall**0.5)
