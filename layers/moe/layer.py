"""Implements a mixture of experts (MoE) layer: a router chooses the experts of each token.

DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models, arXiv 2401.06066: many small
experts, and shared experts for every token, here one gated MLP of their total width.

DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale, arXiv 2201.05596:
an MLP for all tokens beside one expert, with outputs mixed by learned weights (as in its code; the paper adds them up),
and more experts in later layers, which is another config for each block.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from decodax.core.linear import linear
from decodax.core.weight import Weight, fetch, fetch_own
from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.execution import ON_THIS_DEVICE, REPLICATED, Execution
from decodax.layers.feed_forward import Activation, GatedMLP, GatedMLPConfig, check_activation
from decodax.layers.moe.dispatch.contract import Setting
from decodax.layers.moe.dispatch.selection import select_dispatch
from decodax.layers.moe.placement import Placement
from decodax.layers.moe.routers.contract import Router
from decodax.layers.moe.routes import Routes
from decodax.layers.norm import Norm


@dataclass(frozen=True)
class MoENorms:
    """The norms of a layer whose parts norm its input each for itself, and their outputs (Gemma 4).

    router, experts, shared: of these parts' inputs.
    experts_post, shared_post: of the outputs of the experts together, and of the shared MLP.
    """

    router: Norm
    experts: Norm
    shared: Norm
    experts_post: Norm
    shared_post: Norm

    def named(self) -> dict[str, Norm]:
        """The norms by their names in the layer's parameters."""
        return {f"{field.name}_norm": getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class MoEConfig:
    """sum of the chosen experts, each times its gate, + shared(x).

    router: chooses the experts.
    intermediate_size: F of each expert.
    activation: of experts.
    bias: adds one to each of an expert's three products.
    shared: an MLP for all tokens.
    shared_gate: multiplies the shared output by sigmoid(w x), one number per token (Qwen2-MoE).
    residual_mix: experts and shared are mixed by softmax(W x + b), two numbers per token, instead of added
        (DeepSpeed-MoE).
    placement: the slots of experts; the layer's weights are then in the order of slots (`Placement.arrange`).
    norms: of the parts; None where the block norms the layer's input.
    """

    router: Router
    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False
    shared: GatedMLPConfig | None = None
    shared_gate: bool = False
    residual_mix: bool = False
    placement: Placement | None = None
    norms: MoENorms | None = None

    def __post_init__(self) -> None:
        check_activation(self.activation)
        if self.norms is not None and (self.shared is None or self.shared_gate or self.residual_mix):
            raise ValueError("norms are those of experts and a shared MLP that are added: give `shared` and no mixing")
        if self.shared is None and (self.shared_gate or self.residual_mix):
            raise ValueError("shared_gate and residual_mix need the shared MLP: give `shared`, or leave them out")
        if self.shared_gate and self.residual_mix:
            raise ValueError("shared_gate and residual_mix both scale the shared MLP: choose one")
        placement = self.placement
        if placement is None:
            return
        if placement.num_experts != self.router.num_experts:
            raise ValueError(
                f"the placement must be of the router's {self.router.num_experts} experts, got one of "
                f"{placement.num_experts}"
            )
        if self.intermediate_size % placement.slices:
            raise ValueError(
                f"intermediate_size must divide into the placement's {placement.slices} slices, got "
                f"{self.intermediate_size}"
            )

    def weights(self, hidden_size: int) -> dict[str, Any]:
        placement = self.placement
        held = self.router.num_experts if placement is None else placement.num_slots
        wide = self.intermediate_size // (1 if placement is None else placement.slices)
        experts = {
            "gate": Weight(("E", "F", "D"), (held, wide, hidden_size)),
            "up": Weight(("E", "F", "D"), (held, wide, hidden_size)),
            "down": Weight(("E", "D", "F"), (held, hidden_size, wide)),
        }
        if self.bias:
            experts |= {
                "gate_bias": Weight(("E", "F"), (held, wide), "zeros"),
                "up_bias": Weight(("E", "F"), (held, wide), "zeros"),
                "down_bias": Weight(("E", "D"), (held, hidden_size), "zeros"),
            }
        weights: dict[str, Any] = {"router": self.router.weights(hidden_size), "experts": experts}
        if self.shared is not None:
            weights["shared"] = self.shared.weights(hidden_size)
        if self.norms is not None:
            weights |= {name: norm.weights(hidden_size) for name, norm in self.norms.named().items()}
        if self.shared_gate:
            weights["shared_gate"] = Weight(("X", "D"), (1, hidden_size))
        if self.residual_mix:
            weights["residual_mix"] = Weight(("X", "D"), (2, hidden_size))
            weights["residual_mix_bias"] = Weight(("X",), (2,), "zeros")
        return weights

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return MoE(self, hidden_size, execution, name=name)

    def kernel(
        self, hidden_size: int, num_tokens: int, dtype: DTypeLike, execution: Execution = ON_THIS_DEVICE
    ) -> KernelSelection:
        """What multiplies `num_tokens` tokens with the matrices of their experts, and why."""
        from decodax.kernels_pallas.grouped_matmul import select_grouped_matmul  # late: not before it is asked for

        num_rows = int(num_tokens * self.router.experts_per_token)
        tokens = jax.ShapeDtypeStruct((num_rows, hidden_size), dtype)
        weight = jax.ShapeDtypeStruct((self.router.num_experts, self.intermediate_size, hidden_size), dtype)
        has_fused_kernel = self.activation == "silu" and not self.bias
        weights = (weight,) * (2 if has_fused_kernel else 1)
        return select_grouped_matmul(tokens, *weights, implementation=execution.implementation)


class _Weights(nn.Module):
    """A dictionary of weights under one name."""

    described: dict[str, Weight]
    execution: Execution

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        return fetch_own(self, self.described, self.execution.padded)


class MoE(nn.Module):
    """Routes all tokens, runs their experts with the dispatch algorithm of `execution`, and adds the shared MLP."""

    config: MoEConfig
    hidden_size: int
    execution: Execution

    @nn.compact
    def __call__(self, inputs: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Routes]:
        config, described = self.config, self.config.weights(self.hidden_size)
        with jax.named_scope("route"):
            router = _Weights(described["router"], self.execution, name="router")()
            routes = self._routes(self._normed("router", inputs), router)
        with jax.named_scope("experts"):
            experts = _Weights(described["experts"], self.execution, name="experts")()
            tokens = self._normed("experts", inputs).reshape(-1, inputs.shape[-1])
            flat = replace(
                routes, **{name: getattr(routes, name).reshape(len(tokens), -1) for name in ("expert", "gate")}
            )
            dispatch = select_dispatch(self.execution, flat.expert.size)
            setting = Setting(config.activation, self.execution, config.placement)
            output, num_overflowed = dispatch.run(tokens, flat, experts, setting)
            output = self._normed("experts_post", output.reshape(inputs.shape))
        if config.shared is not None:
            with jax.named_scope("shared"):
                output = self._with_shared(inputs, output, described)
        return output, replace(routes, num_overflowed=num_overflowed)

    def _normed(self, name: str, inputs: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        norms = self.config.norms
        return inputs if norms is None else getattr(norms, name).module(self.hidden_size, name=f"{name}_norm")(inputs)

    def _routes(self, inputs: Float[Array, "B T D"], weights: dict[str, Array]) -> Routes:
        """Every device routes its own rows: the compiler would all-gather the scores for the top-k."""

        def route(tokens: Array, weights: dict[str, Array]) -> tuple[Array, Array]:
            routes = self.config.router.route(tokens, weights)
            return routes.expert, routes.gate

        return Routes.of(*self.execution.per_device(route, ("B T D", REPLICATED), ("B T X", "B T X"))(inputs, weights))

    def _with_shared(
        self, inputs: Float[Array, "B T D"], output: Float[Array, "B T D"], described: dict[str, Any]
    ) -> Float[Array, "B T D"]:
        config = self.config
        assert config.shared is not None
        all_reduced = replace(self.execution, sequence_parallel=False)  # summed together with the experts' results
        normed = self._normed("shared", inputs)
        shared, _ = GatedMLP(config.shared, self.hidden_size, all_reduced, name="shared")(normed)
        shared = self._normed("shared_post", shared)
        if config.shared_gate:
            weight = fetch(self, "shared_gate", described["shared_gate"])
            share = jax.nn.sigmoid(linear(inputs, weight, output_dtype=jnp.float32))
            return output + share.astype(shared.dtype) * shared
        if config.residual_mix:
            weight = fetch(self, "residual_mix", described["residual_mix"])
            bias = fetch(self, "residual_mix_bias", described["residual_mix_bias"])
            shares = jax.nn.softmax(linear(inputs, weight, bias, output_dtype=jnp.float32), axis=-1)
            shares = shares.astype(output.dtype)
            return shares[..., :1] * output + shares[..., 1:] * shared
        return output + shared
