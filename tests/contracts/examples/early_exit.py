"""Gives examples of each layer policy, made for any target, each with a drafter that proposes trees.

An example that skips layers is the variant `SKIPS`; all others run every layer for every token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from decodax.decoding.drafters import Drafter, Hints
from decodax.decoding.early_exit import AllLayers, LayerPolicy, RoutedLayers, SkipDecode, SpeculativeExit
from tests.contracts.examples.drafters import Target
from tests.contracts.outside import OUTSIDE
from tests.odd_drafters import RandomTrees

SKIPS = "fewer layers"


@dataclass(frozen=True)
class Example:
    """A layer policy, and the target's parameters with what it needs beside them.

    drafter, draft_params, has_rows: as in the examples of drafters.
    """

    layer_policy: LayerPolicy
    params: Any
    drafter: Drafter
    draft_params: Any
    has_rows: bool = True


Make = Callable[[Target], Example]


def _with_random_trees(target: Target, layer_policy: LayerPolicy, **weights: Any) -> Example:
    """Many nodes are what plain decoding writes."""
    drafter = RandomTrees(model=target.model)
    return Example(layer_policy, target.params | weights, drafter, jnp.asarray(target.written))


def all_layers() -> Make:
    return lambda target: _with_random_trees(target, AllLayers())


def speculative_exit() -> dict[str, Make]:
    """Predictors that never or always fire, whatever their input; all tokens are likely ones, so that all may exit."""

    def make(target: Target, bias: float) -> Example:
        count, vocab_size = target.model.config.num_layers - 1, target.model.config.vocab_size
        predictors = {
            "hidden": jnp.zeros((count, 3 * vocab_size, 2)),
            "hidden_bias": jnp.zeros((count, 2)),
            "out": jnp.zeros((count, 2)),
            "out_bias": jnp.full(count, bias, jnp.float32),
        }
        drafter = Hints(target.model, (-1, 0, 1), num_likely=vocab_size)
        params = target.params | {"exit_predictors": predictors}
        return Example(SpeculativeExit(), params, drafter, target.draft, has_rows=False)

    return {"all layers": lambda target: make(target, -9.0), SKIPS: lambda target: make(target, 9.0)}


def skip_decode() -> dict[str, Make]:
    """A schedule that begins to fall after the end of the texts, and one that falls within them."""

    def make(target: Target, decay_tokens: int) -> Example:
        layer_policy = SkipDecode(target.model.config.num_layers, 1, decay_tokens, warmup=0)
        return _with_random_trees(target, layer_policy)

    return {"all layers": lambda target: make(target, 1000), SKIPS: lambda target: make(target, 7)}


def routed_layers() -> dict[str, Make]:
    """Layer gates that keep every layer, and some that differ between prompts."""

    def make(target: Target, weight: float, bias: float) -> Example:
        count, size = target.model.config.num_layers, target.model.config.hidden_size
        weights = weight * np.random.default_rng(8).standard_normal((count, size))
        gates = {"weight": jnp.asarray(weights, jnp.float32), "bias": jnp.full(count, bias, jnp.float32)}
        layer_policy = RoutedLayers(kept_first=0, kept_last=0)
        return _with_random_trees(target, layer_policy, layer_gates=gates)

    return {
        "all layers": lambda target: make(target, 0.0, -99.0),
        SKIPS: lambda target: make(target, 2.0, 0.0),
    }


def first_layers() -> dict[str, Make]:
    """All layers until after the end of the texts, and one layer from within them on."""
    method = OUTSIDE["early_exit"]["first_layers"]
    return {
        "all layers": lambda target: _with_random_trees(target, method(1, full_tokens=1000)),
        SKIPS: lambda target: _with_random_trees(target, method(1, full_tokens=3)),
    }
