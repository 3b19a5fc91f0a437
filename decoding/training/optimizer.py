"""Builds the optimizer of every training, at learning rate 1; the loop multiplies its update by the current rate.

Muon for the layers' matrices (Jordan 2024; scaled to AdamW's step size as in "Muon is Scalable for LLM Training", arXiv
2502.16982; Turbo-Muon's preconditioning, arXiv 2512.04632, saves one of five iterations) and Adam for embeddings,
norms and all else that is no matrix of a layer; or AdamW for all. Needs optax.
"""

from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Array

from decodax.decoding.training.extra import need
from decodax.decoding.training.plan import Plan

if TYPE_CHECKING:
    import optax


def make_optimizer(plan: Plan) -> "optax.GradientTransformation":
    """The plan's optimizer, with gradients clipped to a global norm of 1.

    Raises ImportError without optax.
    """
    optax = need("optax")

    def matrices(params: dict[str, Any]) -> dict[str, Any]:
        def one(path: Any, leaf: Array) -> Any:
            is_layer_matrix = leaf.ndim == 2 and "embed" not in jax.tree_util.keystr(path)
            return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0) if is_layer_matrix else None

        return jax.tree.map_with_path(one, params)

    if plan.optimizer == "muon":
        update = optax.contrib.muon(
            1.0,
            ns_steps=4,
            preconditioning="aol",
            weight_decay=plan.weight_decay,
            consistent_rms=0.2,
            adam_b2=0.99,
            muon_weight_dimension_numbers=matrices,
        )
    else:
        update = optax.adamw(
            1.0, b2=0.99, weight_decay=plan.weight_decay, mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim == 2, p)
        )
    return optax.chain(optax.clip_by_global_norm(1.0), update)
