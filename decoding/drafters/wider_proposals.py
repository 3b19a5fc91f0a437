"""Defines the two wider proposals: of drafters that run the target's own layers, and with likely tokens as hints."""

from collections.abc import Mapping
from typing import Any, Self

from jaxtyping import Array, Float, Int

from decodax.core import pytree
from decodax.decoding.drafters.contract import Proposal


@pytree.dataclass
class LayerProposal(Proposal):
    """A proposal whose nodes enter the target as hidden states, after the first layers: the drafter has run those.

    hidden: the nodes' hidden states after those layers; after none of them, vectors in place of embeddings.
    cache_updates: of those layers, so that they need not run twice.
    first_layer: the number of those layers, where only the round decides it; `cache_updates` then has an entry for
        every layer of the target, of which those from `first_layer` on are overwritten. None: one for each update.
    layers_run: runs of the target's layers in drafting, for the batch.
    row_layers: those that each row needed.
    """

    hidden: Float[Array, "B C D"]
    cache_updates: tuple[Any, ...] = ()
    first_layer: Int[Array, ""] | None = None
    layers_run: Int[Array, ""] | int = 0
    row_layers: Int[Array, " B"] | int = 0

    @classmethod
    def extend(cls, proposal: Proposal, hidden: Float[Array, "B C D"], **fields: Any) -> Self:
        """The proposal with these hidden states; `fields` are those above."""
        return cls(**_fields(proposal), hidden=hidden, **fields)

    @property
    def inputs(self) -> Float[Array, "B C D"]:
        return self.hidden

    @property
    def has_run_layers(self) -> bool:
        """Whether the drafter has run any layer."""
        return bool(self.cache_updates)


@pytree.dataclass
class HintedProposal(Proposal):
    """A proposal with tokens that the drafter finds likely, whether or not they are nodes; layer policies read them.

    likely: tokens after each node, most probable first; -1 at a node without any, and where it has fewer.
    """

    likely: Int[Array, "B C I"]

    @classmethod
    def extend(cls, proposal: Proposal, likely: Int[Array, "B C I"]) -> Self:
        """The proposal with these likely tokens."""
        return cls(**_fields(proposal), likely=likely)


def _fields(proposal: Proposal) -> Mapping[str, Any]:
    return {name: getattr(proposal, name) for name in Proposal.__dataclass_fields__}
