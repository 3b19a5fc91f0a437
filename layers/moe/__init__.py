"""Lists the feed-forward layers: a gated MLP, and a mixture of experts.

`layer.py` is the mixture of experts, `routers/` choose experts for tokens, `dispatch/` brings tokens to them,
`placement.py` says where experts are.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from decodax.core.lazy import Methods

if TYPE_CHECKING:
    from decodax.layers.feed_forward import FeedForward

METHODS: "Mapping[str, type[FeedForward]]" = Methods(
    __name__, {"gated_mlp": "decodax.layers.feed_forward:GatedMLPConfig", "mixture_of_experts": "layer:MoEConfig"}
)
