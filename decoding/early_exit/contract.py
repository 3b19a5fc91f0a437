"""Defines the contract of a layer policy: which layers of the target run, in prefill and in decoding.

    policy.start(model, params, batch_size)                               -> its state, before prefill
    policy.forward(model, params, state, proposal, position, capture)     -> TargetForward

A layer policy is a frozen, hashable object; what changes is in its state (`state.layer_policy`). Weights trained for it
are in the target's `params`, beside its layers. No query attends to the cache update of a layer that did not run, and
no cache passes through a `lax.cond`: layers return cache updates, and the loop commits them.
"""

from typing import Any, ClassVar

from jaxtyping import Array, Int

from decodax.core import pytree
from decodax.decoding.drafters.contract import Proposal
from decodax.decoding.state import DecodeState
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.models.model import Model, Params
from decodax.models.transformer import Forward


@pytree.dataclass
class TargetForward:
    """The result of a forward.

    forward: hidden states after the last layer that ran, and cache updates of every layer.
    layers_run: layers that the batch ran, those that the drafter ran for the proposal included.
    row_layers: those that each row needed; a layer that runs for one row of a batch runs for all, so this is at most
        `layers_run`.
    state: the layer policy's own after the forward.
    """

    forward: Forward
    layers_run: Int[Array, ""]
    row_layers: Int[Array, " B"]
    state: Any


class LayerPolicy:
    """What decoding needs of a layer policy; only `forward` has to be written.

    lossless: the tokens follow the target distribution exactly.
    auxiliary_weights: weights beyond the target's own that it needs; None for none.
    cache_policy: what keeps the keys and values; a layer policy needs caches that mark tokens (`MarkedCache`) if it
        skips layers for some tokens to which later ones would attend there.
    """

    lossless: ClassVar[bool] = False
    auxiliary_weights: ClassVar[str | None] = None

    @property
    def cache_policy(self) -> CachePolicy:
        return KVCache

    @property
    def prefill_policy(self) -> "LayerPolicy | None":
        """The layer policy for prefill; None where it runs all layers."""
        return None

    def check(self, model: Model, params: Params) -> None:
        """Raises ValueError when the target cannot run under this policy."""

    def start(self, model: Model, params: Params, batch_size: int) -> Any:
        """The layer policy's state before prefill."""
        return ()

    def prefill_chunk(
        self, model: Model, params: Params, state: DecodeState, start: Int[Array, ""] | int, chunk: int
    ) -> DecodeState:
        """The state after prompt tokens start .. start + chunk - 1; called where `prefill_policy` is this one."""
        raise NotImplementedError(f"{type(self).__name__} must say which layers its prompts run")

    def forward(
        self,
        model: Model,
        params: Params,
        state: DecodeState,
        proposal: Proposal,
        position: Int[Array, "B C"],
        capture: tuple[int, ...],
    ) -> TargetForward:
        """Runs the target over all nodes of a proposal, from the first layer that the drafter has not run.

        position: of the nodes.
        capture: after how many layers the hidden states are needed too.
        """
        raise NotImplementedError(f"{type(self).__name__} must say which layers it runs")
