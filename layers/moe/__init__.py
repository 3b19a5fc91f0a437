"""Mixtures of experts from parts that are data: a router says who goes where, a placement where experts are.

`layer.py` is the layer, `routers/` choose experts for tokens, `experts/` are the ways to run them, all with one result.
"""

from decodax.layers.feed_forward import FeedForward, GatedMLPConfig
from decodax.layers.moe.layer import MoEConfig

METHODS: dict[str, type[FeedForward]] = {"gated_mlp": GatedMLPConfig, "mixture_of_experts": MoEConfig}
