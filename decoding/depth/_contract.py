"""The contract of a depth: which layers of the target a forward runs, when prompts are read and when tokens are found.

    depth.start(model, params, batch_size)                               -> its state, before the prompts are read
    depth.forward(model, params, state, proposal, position, capture)     -> Reached

A depth is a frozen, hashable object; whatever changes stands in its state (`state.depth`). What is trained for it are
weights of the target, beside its layers in `params`. A layer that does not run gives no rows that anyone reads, and no
cache passes through a `lax.cond`: layers hand out rows, and the loop commits them.
"""

from typing import Any, ClassVar

from jaxtyping import Array, Int

from decodax.decoding.drafters._contract import Proposal
from decodax.decoding.state import DecodeState, PromptReader
from decodax.layers import pytree
from decodax.layers.kv_cache._contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.models.model import Model, Params
from decodax.models.transformer import Forward


@pytree.dataclass
class Reached:
    """What a forward gave. forward: hidden states after the last layer that ran, and rows of every layer.

    layers_run: layers that the batch ran. row_layers: those that each row asked for; what is run for one row of a batch
    is run for all, so this is at most `layers_run`. state: the depth's own after the forward.
    """

    forward: Forward
    layers_run: Int[Array, ""]
    row_layers: Int[Array, " B"]
    state: Any


class Depth:
    """What a decoding run asks of a depth; only `forward` has to be written.

    lossless: the tokens follow the target's law exactly. cache_policy: what keeps the rows; a depth that leaves out
    layers for some tokens that later ones would read needs caches that mark them (`MarkedCache`).
    """

    lossless: ClassVar[bool] = False
    trained_part: ClassVar[str | None] = None

    @property
    def cache_policy(self) -> CachePolicy:
        return KVCache

    @property
    def prompt_reader(self) -> PromptReader | None:
        """What reads the prompts; None where they run all layers."""
        return None

    def check(self, model: Model, params: Params) -> None:
        """Raises ValueError when the target cannot be run so."""

    def start(self, model: Model, params: Params, batch_size: int) -> Any:
        """The depth's state before the prompts are read."""
        return ()

    def forward(
        self,
        model: Model,
        params: Params,
        state: DecodeState,
        proposal: Proposal,
        position: Int[Array, "B C"],
        capture: tuple[int, ...],
    ) -> Reached:
        """Runs the target over all nodes of a proposal, from the first layer that the drafter has not run."""
        raise NotImplementedError(f"{type(self).__name__} must say which layers it runs")
