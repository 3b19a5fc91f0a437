"""Trains a LoRA adapter of a model for fewer layers at later tokens, with SkipDecode's layer schedule.

SkipDecode, arXiv 2307.02628. Each row of text is treated as a prompt and a text generated after it, which begins at a
random place; from there on the number of layers falls to its minimum, which it reaches at another random place.
All layers are computed for all tokens, and a token keeps only what its own layers add. As the number never grows, the
tokens that a token attends to have run the layer in question, so attention needs no further mask.

Departs from the paper, which trains all weights on the text itself: what is trained is a LoRA adapter (arXiv
2106.09685), and the loss is the Kullback-Leibler divergence from the unchanged model with all its layers, so that the
tokens stay those of the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decodax.decoding.early_exit.skip_decode import SkipDecode
from decodax.decoding.training.auxiliary import AuxiliaryTraining
from decodax.decoding.training.distillation import kl_divergence, window_logits
from decodax.layers.adapters.low_rank import low_rank_change, merged
from decodax.models.model import Model, Params

EVALUATED_LAYER_COUNTS = 4  # numbers of layers whose agreement with the model is reported one by one


@dataclass(frozen=True)
class SkipDecodeShape:
    """The schedule and the change.

    min_layers, warmup: as in `SkipDecode`.
    max_layers: of the prompt and the first new token, None for all.
    rank: of the change of every matrix.
    """

    min_layers: int
    max_layers: int | None = None
    warmup: int = 1
    rank: int = 16

    def layer_policy(self, total: int, decay_tokens: int) -> SkipDecode:
        """The layer policy that decodes a model of `total` layers.

        Raises ValueError when the layers do not fit.
        """
        return SkipDecode(self.max_layers or total, self.min_layers, decay_tokens, self.warmup)


def skipping_logits(
    model: Model, params: Params, tokens: Int[Array, "B T"], layer_policy: SkipDecode, num_layers: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Next-token logits after every token of windows, where each token runs its own `num_layers`, which never grow."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, total = model.embed(params, tokens, position), model.config.num_layers
    for index in range(total):
        active = layer_policy.active(index, total, num_layers)
        if active is False:
            continue
        new = model.apply(params, hidden, position, layers=(index, index + 1)).hidden
        hidden = new if active is True else jnp.where(active[..., None], new, hidden)
    return model.logits(params, hidden)


def falling_layers(
    layer_policy: SkipDecode, start: Int[Array, " B"], decay_tokens: Int[Array, " B"], num_tokens: int
) -> Int[Array, "B T"]:
    """Layers of every token of windows whose generated text begins at `start`.

    layer_policy: the schedule, with a slope per row.
    start: the last token of the prompt: running it gives the first generated token.
    decay_tokens: tokens after which the number of layers is at its minimum.
    """
    new_tokens = jnp.maximum(jnp.arange(num_tokens, dtype=jnp.int32)[None, :] - start[:, None], 0)
    passed, span = jnp.minimum(new_tokens, decay_tokens[:, None]), layer_policy.max_layers - layer_policy.min_layers
    return layer_policy.max_layers - span * passed // decay_tokens[:, None]


@dataclass(frozen=True)
class SkipDecodeTraining(AuxiliaryTraining):
    """The training of the LoRA adapter; `shape` is a `SkipDecodeShape`."""

    shape: SkipDecodeShape

    kind = "skip_decode"
    curve_title, curve_unit = "Training SkipDecode's layers", "KL(all layers || fewer layers), nats"
    curve_shares: ClassVar[Mapping[str, str]] = {"greedy": "same most probable token"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layer_policy.check(self.target.model, self.target.params)

    @property
    def layer_policy(self) -> SkipDecode:
        """The schedule with its end left open, as every row has its own."""
        return self.shape.layer_policy(self.target.config.num_layers, decay_tokens=1)

    def initial(self) -> Params:
        key = jax.random.key(self.plan.seed)
        return {"low_rank": low_rank_change(self.target.params, self.shape.rank, key)}

    def loss(self, trained, target_params, rows, step):
        tokens, model = rows[:, :-1], self.target.model
        target = jax.lax.stop_gradient(window_logits(model, target_params, tokens))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(self.plan.seed), step))
        batch, size = tokens.shape
        start = jax.random.randint(keys[0], (batch,), 0, size)
        decay_tokens = jax.random.randint(keys[1], (batch,), 1, size - start + 1)
        num_layers = falling_layers(self.layer_policy, start, decay_tokens, size)
        params = merged(target_params, trained["low_rank"])
        return kl_divergence(target, skipping_logits(model, params, tokens, self.layer_policy, num_layers)).mean()

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"], *, batch: int = 4) -> dict[str, Any]:
        """Measures the changed model with fewer layers.

        heldout_loss: the loss, where generation begins at places spread evenly over the windows, and the last half of
            what is left of a row runs the fewest layers.
        greedy: share of the generated tokens of these rows where the model with all its layers has the same argmax.
        agreement_by_layers: [n, that share] where all tokens of the windows' second halves run n layers.
        """
        count, size = windows.shape[0], windows.shape[1] - 1
        spread = (np.arange(count) * size // count).astype(np.int32)
        shown = np.linspace(self.layer_policy.min_layers, self.layer_policy.max_layers, EVALUATED_LAYER_COUNTS)
        layer_counts = sorted({round(float(layers)) for layers in shown})
        params = merged(self.target.params, trained["low_rank"])
        sums = np.zeros((1 + len(layer_counts), 4))
        for first in range(0, count, batch):
            tokens, start = windows[first : first + batch, :-1], spread[first : first + batch]
            padding = batch - len(tokens)  # the last piece is padded, so that one shape is compiled
            counted = np.arange(batch) < len(tokens)
            tokens, start = np.pad(tokens, ((0, padding), (0, 0))), np.pad(start, (0, padding))
            sums += np.asarray(
                _sums(
                    self.target.model,
                    self.layer_policy,
                    layer_counts,
                    self.target.params,
                    params,
                    tokens,
                    start,
                    counted,
                ),
                np.float64,
            )
        agreement = (sums[:, 3] / sums[:, 2]).tolist()
        by_layers = [[layers, share] for layers, share in zip(layer_counts, agreement[1:], strict=True)]
        return {
            "heldout_loss": float(sums[0, 1] / sums[0, 0]),
            "greedy": agreement[0],
            "agreement_by_layers": by_layers,
        }


def _sums(
    model: Model,
    layer_policy: SkipDecode,
    layer_counts: list[int],
    target_params: Params,
    params: Params,
    tokens: Int[np.ndarray, "B T"],
    start: Int[np.ndarray, " B"],
    counted: Bool[np.ndarray, " B"],
) -> Float[Array, "runs 4"]:
    """Per schedule, the falling one first: tokens, their KL, generated tokens, and agreements of those."""
    size = tokens.shape[1]
    half = np.full(start.shape, size // 2, np.int32)
    is_late = np.broadcast_to(np.arange(size)[None, :] >= size // 2, tokens.shape)
    fixed = [np.where(is_late, layers, layer_policy.max_layers).astype(np.int32) for layers in layer_counts]
    begin = jnp.asarray(start)
    falling = falling_layers(layer_policy, begin, jnp.maximum((size - begin) // 2, 1), size)
    num_layers = jnp.stack([falling, *map(jnp.asarray, fixed)])
    starts = jnp.stack([jnp.asarray(start), *[jnp.asarray(half)] * len(layer_counts)])
    return _sums_of_runs(model, layer_policy, target_params, params, jnp.asarray(tokens), num_layers, starts, counted)


@partial(jax.jit, static_argnums=(0, 1))
def _sums_of_runs(
    model, layer_policy, target_params, params, tokens, num_layers, starts, counted
) -> Float[Array, "runs 4"]:
    target = window_logits(model, target_params, tokens)
    best = jnp.argmax(target, axis=-1)
    counted = jnp.broadcast_to(counted[:, None], tokens.shape)

    def one(run: tuple[Array, Array]) -> Array:
        layers, start = run
        logits = skipping_logits(model, params, tokens, layer_policy, layers)
        generated = counted & (jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] >= start[:, None])
        agrees = generated & (jnp.argmax(logits, axis=-1) == best)
        kl = jnp.sum(jnp.where(counted, kl_divergence(target, logits), 0.0))
        counts = (jnp.sum(which).astype(jnp.float32) for which in (counted, generated, agrees))
        tokens_counted, tokens_generated, agreements = counts
        return jnp.stack([tokens_counted, kl, tokens_generated, agreements])

    return jax.lax.map(one, (num_layers, starts))
