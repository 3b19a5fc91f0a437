"""Gives examples of every router, each with its oracle: those of published models, and experts that choose."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from decodax.layers.moe.routers.contract import Router
from decodax.layers.moe.routers.expert_choice import ExpertChoice
from decodax.layers.moe.routers.top_k import TopK
from tests.oracles import mixture_of_experts


@dataclass(frozen=True)
class RouterExample:
    """A router, and by definition its choices and gates [T, X] of one row, from (tokens [T, D], weights) in float64."""

    router: Router
    wanted: Callable[[np.ndarray, dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]


def top_k():
    def example(router, renormalise, **options):
        def wanted(tokens, weights):
            logits, bias = tokens @ weights["weight"].T + weights.get("bias", 0), weights.get("selection_bias", 0)
            options_of_all: dict[str, Any] = {"selection_bias": bias, "renormalise": renormalise, **options}
            logits = logits * router.logit_scale
            expert, gate = mixture_of_experts.route(logits, router.experts_per_token, **options_of_all)
            return expert, gate * weights.get("expert_scale", np.ones(router.num_experts))[expert]

        return RouterExample(router, wanted)

    deepseek_v2 = TopK(15, 4, "softmax", False, scale=16.0, num_groups=5, num_groups_kept=2)
    deepseek_v3 = TopK(
        16, 6, "sigmoid", True, 2.5, selection_bias=True, num_groups=4, num_groups_kept=2, group_score="top2_sum"
    )
    return {
        "mixtral": example(TopK(5, 2, "softmax", True), True, score="softmax"),
        "olmoe": example(TopK(13, 3, "softmax", False), False, score="softmax"),
        "gpt-oss": example(TopK(8, 4, "softmax", True, router_bias=True), True, score="softmax"),
        "deepseek v2": example(deepseek_v2, False, score="softmax", scale=16.0, groups=5, kept=2),
        "deepseek v3": example(deepseek_v3, True, score="sigmoid", scale=2.5, groups=4, kept=2, by="top2"),
        "gemma 4": example(TopK(7, 3, "softmax", True, logit_scale=0.3, expert_scale=True), True, score="softmax"),
        "sigmoid alone": example(TopK(6, 6, "sigmoid", False), False, score="sigmoid"),
    }


def expert_choice():
    """Each expert takes its best tokens of a row."""

    def example(experts_per_token):
        def wanted(tokens, weights):
            scores = np.exp(tokens @ weights["weight"].T)
            scores /= scores.sum(axis=1, keepdims=True)
            num_taken = int(np.ceil(len(tokens) * experts_per_token / 5))
            is_taken = np.argsort(np.argsort(-scores, axis=0), axis=0) < num_taken
            return np.where(is_taken, np.arange(5), -1), np.where(is_taken, scores, 0.0)

        return RouterExample(ExpertChoice(5, experts_per_token), wanted)

    return {"1.5 experts": example(1.5), "all experts": example(5.0)}
