"""Ways to choose experts for tokens."""

from decodax.layers.moe.routers._contract import Router
from decodax.layers.moe.routers.expert_choice import ExpertChoice
from decodax.layers.moe.routers.top_k import TopK

METHODS: dict[str, type[Router]] = {"top_k": TopK, "expert_choice": ExpertChoice}

__all__ = ["METHODS", "Router"]
