"""Trains FiRST in two stages: layer gates that skip layers per text, then a LoRA adapter that compensates.

FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, arXiv 2410.12513. Stage one
(`LayerGateTraining`) trains the layer gates alone. Each layer's contribution is scaled by the chance that the layer
runs, and a regulariser rewards chances to skip. Stage two (`RoutedChangeTraining`) keeps the layer gates, decides as
decoding does, and trains a LoRA adapter of the layers (arXiv 2106.09685).

Departs from the paper: the loss is the Kullback-Leibler divergence from the unchanged model with all its layers, not
that of the text. A row of text is its own prompt: the chances are averaged over the whole row, with later tokens than a
prompt would have. The weight of the regulariser is therefore in nats of that divergence, and larger than the paper's
0.01.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decodax.decoding.early_exit.routed_layers import RoutedLayers, skip_probability
from decodax.decoding.training.auxiliary import AuxiliaryTraining
from decodax.decoding.training.distillation import kl_divergence, window_logits
from decodax.layers.adapters.low_rank import low_rank_change, merged
from decodax.models.model import Model, Params


@dataclass(frozen=True)
class RoutedShape:
    """The fields of `RoutedLayers`, and what the loss of the layer gates adds to the divergence.

    regulariser: nats for running every routed layer, so a layer is skipped where that costs less than regulariser /
        (number of routed layers).
    decisiveness: nats for chances that all are one half, none for chances of 0 or 1.
    start_bias: of every layer gate at step 0; sigmoid(-2) = 0.12, a model hardly changed.
    """

    regulariser: float = 1.5
    decisiveness: float = 0.0
    start_bias: float = -2.0
    threshold: float = 0.5
    kept_first: int = 1
    kept_last: int = 1

    def layer_policy(self) -> RoutedLayers:
        return RoutedLayers(self.threshold, self.kept_first, self.kept_last)


@dataclass(frozen=True)
class RoutedChangeShape(RoutedShape):
    """The fields that the layer gates were trained with, and the change.

    rank: of the change of every matrix.
    """

    rank: int = 16


def routed_logits(
    model: Model, params: Params, tokens: Int[Array, "B T"], layer_policy: RoutedLayers, *, hard: bool
) -> tuple[Float[Array, "B T V"], Float[Array, "B R"]]:
    """Next-token logits after every token of windows, and each row's chance to skip each of the routed layers.

    hard: a row runs a layer or skips it, as when decoding, and the chances are 0 or 1; otherwise what the layer adds is
        multiplied by the chance that it runs.
    """
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, total, skips = model.embed(params, tokens, position), model.config.num_layers, []
    for index in range(total):
        new = model.apply(params, hidden, position, layers=(index, index + 1)).hidden
        if not layer_policy.is_routed(index, total):
            hidden = new
            continue
        skip = skip_probability(params["layer_gates"], index, hidden, jnp.ones(tokens.shape, bool))
        if hard:
            is_skipped = skip > layer_policy.threshold
            skip, hidden = is_skipped.astype(jnp.float32), jnp.where(is_skipped[:, None, None], hidden, new)
        else:
            hidden = hidden + (1.0 - skip)[:, None, None].astype(hidden.dtype) * (new - hidden)
        skips.append(skip)
    return model.logits(params, hidden), jnp.stack(skips, axis=1)


def soft_losses(
    model: Model, shape: RoutedShape, target_params: Params, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, " B"]:
    """The loss of the layer gates in `params` on each row: divergence, regulariser, indecision."""
    target = jax.lax.stop_gradient(window_logits(model, target_params, tokens))
    logits, skip = routed_logits(model, params, tokens, shape.layer_policy(), hard=False)
    regulariser = shape.regulariser * (1 - skip) + shape.decisiveness * 4 * skip * (1 - skip)
    return kl_divergence(target, logits).mean(axis=1) + regulariser.mean(axis=1)


@dataclass(frozen=True)
class _RoutedTraining(AuxiliaryTraining):
    """What both stages share: the kind of auxiliary weights, and their measures."""

    shape: RoutedShape

    kind = "first"
    curve_unit = "nats"
    curve_shares: ClassVar[Mapping[str, str]] = {"greedy": "same most probable token", "skip_rate": "layers skipped"}

    def __post_init__(self) -> None:
        super().__post_init__()
        total, layer_policy = self.target.config.num_layers, self.shape.layer_policy()
        if not any(layer_policy.is_routed(index, total) for index in range(total)):
            raise ValueError(
                f"some layer must be left to the layer gates, got {layer_policy.kept_first} first and "
                f"{layer_policy.kept_last} last layers of {total} that always run"
            )

    def changed(self, trained: Params, target_params: Params) -> Params:
        """The target's parameters with the trained ones."""
        raise NotImplementedError

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"], *, batch: int = 4) -> dict[str, Any]:
        """Skips layers as decoding does, each window being its own prompt.

        skip_rate: share of all layers skipped.
        kl: mean divergence from the unchanged model.
        greedy: share of tokens at which both have the same most probable token.
        skipped_by_layer: share of the windows that skip each layer, from the first.
        """
        params, layer_policy = self.changed(trained, self.target.params), self.shape.layer_policy()
        total = self.target.config.num_layers
        routed = [index for index in range(total) if layer_policy.is_routed(index, total)]
        sums, skipped = np.zeros(2), np.zeros(total)
        for tokens, counted in _pieces(windows, batch):
            kl, agreements, skip = _sums(self.target.model, layer_policy, self.target.params, params, tokens, counted)
            sums += np.array([float(kl), float(agreements)])
            skipped[routed] += np.asarray(skip, np.float64)
        kl, greedy = (sums / (len(windows) * (windows.shape[1] - 1))).tolist()
        shares = (skipped / len(windows)).tolist()
        return {
            "heldout_loss": kl,
            "kl": kl,
            "greedy": greedy,
            "skip_rate": float(np.mean(shares)),
            "skipped_by_layer": shares,
        }


@dataclass(frozen=True)
class LayerGateTraining(_RoutedTraining):
    """Stage one: the layer gates alone; `shape` is a `RoutedShape`. Its weights decode without stage two as well."""

    curve_title = "Training FiRST's layer gates"

    def initial(self) -> Params:
        config = self.target.config
        weight = jnp.zeros((config.num_layers, config.hidden_size))
        return {"layer_gates": {"weight": weight, "bias": jnp.full(config.num_layers, self.shape.start_bias)}}

    def changed(self, trained: Params, target_params: Params) -> Params:
        return target_params | trained

    def loss(self, trained, target_params, rows, step):
        tokens, params = rows[:, :-1], self.changed(trained, target_params)
        return soft_losses(self.target.model, self.shape, target_params, params, tokens).mean()

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"], *, batch: int = 4) -> dict[str, Any]:
        """The measures of decoding with the layer gates so far, and as `heldout_loss` the training loss."""
        found, params = super().measure(trained, windows, batch=batch), self.changed(trained, self.target.params)
        total = 0.0
        for tokens, counted in _pieces(windows, batch):
            losses = _soft_losses(self.target.model, self.shape, self.target.params, params, tokens)
            total += float(np.sum(np.asarray(losses)[counted]))
        return found | {"heldout_loss": total / len(windows)}


@dataclass(frozen=True)
class RoutedChangeTraining(_RoutedTraining):
    """Stage two: a LoRA adapter, with the frozen `layer_gates` of stage one; `shape` is a `RoutedChangeShape`."""

    shape: RoutedChangeShape
    layer_gates: Params

    curve_title, curve_unit = "Training FiRST's layers", "KL(all layers || routed layers), nats"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shape.layer_policy().check(self.target.model, {"layer_gates": self.layer_gates})

    def initial(self) -> Params:
        key = jax.random.key(self.plan.seed)
        return {"low_rank": low_rank_change(self.target.params, self.shape.rank, key)}

    def changed(self, trained: Params, target_params: Params) -> Params:
        return merged(target_params, trained["low_rank"]) | {"layer_gates": self.layer_gates}

    def loss(self, trained, target_params, rows, step):
        model, tokens = self.target.model, rows[:, :-1]
        target = jax.lax.stop_gradient(window_logits(model, target_params, tokens))
        params = self.changed(trained, target_params)
        logits, _ = routed_logits(model, params, tokens, self.shape.layer_policy(), hard=True)
        return kl_divergence(target, logits).mean()

    def write(self, folder, trained, facts, dtype):
        super().write(folder, trained | {"layer_gates": self.layer_gates}, facts, dtype)

    def about(self) -> dict[str, Any]:
        layer_gates = b"".join(np.asarray(self.layer_gates[name], np.float32).tobytes() for name in ("weight", "bias"))
        return super().about() | {"layer_gates": hashlib.sha256(layer_gates).hexdigest()[:16]}


@partial(jax.jit, static_argnums=(0, 1))
def _sums(model, layer_policy, target_params, params, tokens, counted) -> tuple[Array, Array, Array]:
    """Sums over counted windows: divergence, tokens with the same argmax, and skips per routed layer."""
    target = window_logits(model, target_params, tokens)
    logits, skip = routed_logits(model, params, tokens, layer_policy, hard=True)
    each = counted[:, None]
    kl = jnp.sum(jnp.where(each, kl_divergence(target, logits), 0.0))
    agrees = each & (jnp.argmax(logits, axis=-1) == jnp.argmax(target, axis=-1))
    return kl, jnp.sum(agrees), jnp.sum(jnp.where(each, skip, 0.0), axis=0)


_soft_losses = jax.jit(soft_losses, static_argnums=(0, 1))


def _pieces(
    windows: Int[np.ndarray, "W T_plus_1"], batch: int
) -> Iterator[tuple[Int[Array, "B T"], Bool[np.ndarray, " B"]]]:
    """A few windows at a time and which of them count: the last piece is padded, so that one shape is compiled."""
    for first in range(0, len(windows), batch):
        piece = windows[first : first + batch, :-1]
        padding = batch - len(piece)
        yield jnp.asarray(np.pad(piece, ((0, padding), (0, 0)))), np.arange(batch) < len(piece)
