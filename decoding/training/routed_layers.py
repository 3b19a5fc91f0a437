"""Trains FiRST in two stages: routers that say which layers a text can do without, then a change that makes up for it.

FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction, arXiv 2410.12513. Stage one
(`RouterTraining`) trains the routers alone. Each layer's contribution is scaled by the chance that the layer runs, and
a regulariser rewards chances to skip. Stage two (`RoutedChangeTraining`) keeps the routers, decides as decoding does,
and trains a low-rank change of the layers (LoRA, arXiv 2106.09685).

Departs from the paper: the loss is the Kullback-Leibler divergence from the unchanged model at full depth, not that of
the text. A row of text is its own prompt: the chances are averaged over the whole row, with later tokens than a prompt
would have. The weight of the regulariser is therefore in nats of that divergence, and larger than the paper's 0.01.
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

from decodax.decoding.depth.routed_layers import RoutedLayers, skip_probability
from decodax.decoding.training.distillation import kl_divergence, window_logits
from decodax.decoding.training.part import PartTraining
from decodax.layers.adapters.low_rank import low_rank_change, merged
from decodax.models.model import Model, Params


@dataclass(frozen=True)
class RoutedShape:
    """The fields of `RoutedLayers`, and what the loss of the routers adds to the divergence.

    regulariser: nats for running every routed layer, so a layer is given up where that costs less than regulariser /
    (number of routed layers). decisiveness: nats for chances that all are one half, none for chances of 0 or 1.
    start_bias: of every router at step 0; sigmoid(-2) = 0.12, a model hardly changed.
    """

    regulariser: float = 1.5
    decisiveness: float = 0.0
    start_bias: float = -2.0
    threshold: float = 0.5
    kept_first: int = 1
    kept_last: int = 1

    def depth(self) -> RoutedLayers:
        return RoutedLayers(self.threshold, self.kept_first, self.kept_last)


@dataclass(frozen=True)
class RoutedChangeShape(RoutedShape):
    """With the rank of the change of every matrix; the other fields are those that the routers were trained with."""

    rank: int = 16


def routed_logits(
    model: Model, params: Params, tokens: Int[Array, "B T"], depth: RoutedLayers, *, hard: bool
) -> tuple[Float[Array, "B T V"], Float[Array, "B R"]]:
    """Next-token logits after every token of windows, and each row's chance to skip each of the routed layers.

    hard: a row runs a layer or skips it, as when decoding, and the chances are 0 or 1; otherwise the row takes over
    what the layer adds times the chance that it runs.
    """
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, total, skips = model.embed(params, tokens), model.config.num_layers, []
    for index in range(total):
        new = model.apply(params, hidden, position, layers=(index, index + 1)).hidden
        if not depth.is_routed(index, total):
            hidden = new
            continue
        skip = skip_probability(params["routers"], index, hidden, jnp.ones(tokens.shape, bool))
        if hard:
            is_skipped = skip > depth.threshold
            skip, hidden = is_skipped.astype(jnp.float32), jnp.where(is_skipped[:, None, None], hidden, new)
        else:
            hidden = hidden + (1.0 - skip)[:, None, None].astype(hidden.dtype) * (new - hidden)
        skips.append(skip)
    return model.logits(params, hidden), jnp.stack(skips, axis=1)


def soft_losses(
    model: Model, shape: RoutedShape, target_params: Params, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, " B"]:
    """The loss of the routers in `params` on each row: divergence, regulariser, indecision."""
    target = jax.lax.stop_gradient(window_logits(model, target_params, tokens))
    logits, skip = routed_logits(model, params, tokens, shape.depth(), hard=False)
    regulariser = shape.regulariser * (1 - skip) + shape.decisiveness * 4 * skip * (1 - skip)
    return kl_divergence(target, logits).mean(axis=1) + regulariser.mean(axis=1)


@dataclass(frozen=True)
class _RoutedTraining(PartTraining):
    """What both stages share: the kind of part, and how it is judged."""

    shape: RoutedShape

    kind = "first"
    curve_unit = "nats"
    curve_shares: ClassVar[Mapping[str, str]] = {"greedy": "same likeliest token", "skip_rate": "layers skipped"}

    def __post_init__(self) -> None:
        super().__post_init__()
        total, depth = self.target.config.num_layers, self.shape.depth()
        if not any(depth.is_routed(index, total) for index in range(total)):
            raise ValueError(
                f"some layer must be left to the routers, got {depth.kept_first} first and {depth.kept_last} last "
                f"layers of {total} that always run"
            )

    def changed(self, trained: Params, target_params: Params) -> Params:
        """The target's parameters with what is trained."""
        raise NotImplementedError

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"], *, batch: int = 4) -> dict[str, Any]:
        """As decoding decides, each window being its own prompt: layers skipped (of all), and what that does.

        kl: mean divergence from the unchanged model; greedy: share of tokens at which both find the same likeliest.
        skipped_by_layer: share of the windows that skip each layer, from the first.
        """
        params, depth = self.changed(trained, self.target.params), self.shape.depth()
        total = self.target.config.num_layers
        routed = [index for index in range(total) if depth.is_routed(index, total)]
        sums, skipped = np.zeros(2), np.zeros(total)
        for tokens, counted in _pieces(windows, batch):
            kl, agreements, skip = _sums(self.target.model, depth, self.target.params, params, tokens, counted)
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
class RouterTraining(_RoutedTraining):
    """Stage one: the routers alone; `shape` is a `RoutedShape`. What it writes decodes without stage two as well."""

    curve_title = "Training FiRST's routers"

    def initial(self) -> Params:
        config = self.target.config
        weight = jnp.zeros((config.num_layers, config.hidden_size))
        return {"routers": {"weight": weight, "bias": jnp.full(config.num_layers, self.shape.start_bias)}}

    def changed(self, trained: Params, target_params: Params) -> Params:
        return target_params | trained

    def loss(self, trained, target_params, rows, step):
        tokens, params = rows[:, :-1], self.changed(trained, target_params)
        return soft_losses(self.target.model, self.shape, target_params, params, tokens).mean()

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"], *, batch: int = 4) -> dict[str, Any]:
        """What decoding does with the routers so far, and as `heldout_loss` the loss that they are trained with."""
        found, params = super().measure(trained, windows, batch=batch), self.changed(trained, self.target.params)
        total = 0.0
        for tokens, counted in _pieces(windows, batch):
            losses = _soft_losses(self.target.model, self.shape, self.target.params, params, tokens)
            total += float(np.sum(np.asarray(losses)[counted]))
        return found | {"heldout_loss": total / len(windows)}


@dataclass(frozen=True)
class RoutedChangeTraining(_RoutedTraining):
    """Stage two: a low-rank change, with the `routers` of stage one as they are; `shape` is a `RoutedChangeShape`."""

    shape: RoutedChangeShape
    routers: Params

    curve_title, curve_unit = "Training FiRST's layers", "KL(all layers || routed layers), nats"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shape.depth().check(self.target.model, {"routers": self.routers})

    def initial(self) -> Params:
        key = jax.random.key(self.plan.seed)
        return {"low_rank": low_rank_change(self.target.params, self.shape.rank, key)}

    def changed(self, trained: Params, target_params: Params) -> Params:
        return merged(target_params, trained["low_rank"]) | {"routers": self.routers}

    def loss(self, trained, target_params, rows, step):
        model, tokens = self.target.model, rows[:, :-1]
        wanted = jax.lax.stop_gradient(window_logits(model, target_params, tokens))
        params = self.changed(trained, target_params)
        return kl_divergence(wanted, routed_logits(model, params, tokens, self.shape.depth(), hard=True)[0]).mean()

    def write(self, folder, trained, facts, dtype):
        super().write(folder, trained | {"routers": self.routers}, facts, dtype)

    def about(self) -> dict[str, Any]:
        routers = b"".join(np.asarray(self.routers[name], np.float32).tobytes() for name in ("weight", "bias"))
        return super().about() | {"routers": hashlib.sha256(routers).hexdigest()[:16]}


@partial(jax.jit, static_argnums=(0, 1))
def _sums(model, depth, target_params, params, tokens, counted) -> tuple[Array, Array, Array]:
    """Over the windows counted: divergence, tokens of the same likeliest, and skips per routed layer."""
    target = window_logits(model, target_params, tokens)
    logits, skip = routed_logits(model, params, tokens, depth, hard=True)
    each = counted[:, None]
    kl = jnp.sum(jnp.where(each, kl_divergence(target, logits), 0.0))
    agrees = each & (jnp.argmax(logits, axis=-1) == jnp.argmax(target, axis=-1))
    return kl, jnp.sum(agrees), jnp.sum(jnp.where(each, skip, 0.0), axis=0)


_soft_losses = jax.jit(soft_losses, static_argnums=(0, 1))


def _pieces(
    windows: Int[np.ndarray, "W T_plus_1"], batch: int
) -> Iterator[tuple[Int[Array, "B T"], Bool[np.ndarray, " B"]]]:
    """A few windows at a time and which of them count: the last piece is filled up, so that one shape is compiled."""
    for first in range(0, len(windows), batch):
        piece = windows[first : first + batch, :-1]
        padding = batch - len(piece)
        yield jnp.asarray(np.pad(piece, ((0, padding), (0, 0)))), np.arange(batch) < len(piece)
