"""Defines the contract of a dispatch algorithm: all give the same result, up to rounding."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from decodax.layers.execution import Execution
from decodax.layers.feed_forward import Activation
from decodax.layers.moe.placement import Placement
from decodax.layers.moe.routes import Routes


class Setting(NamedTuple):
    """What is fixed at compile time.

    activation: of the experts.
    execution: with kernels and mesh.
    placement: None for experts in their order, one in each slot.
    """

    activation: Activation
    execution: Execution
    placement: Placement | None = None


@runtime_checkable
class ExpertDispatch(Protocol):
    """A frozen dataclass of options."""

    def run(
        self, tokens: Float[Array, "M D"], routes: Routes, weights: dict[str, Any], setting: Setting
    ) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
        """The sum of each token's experts times their gates, and how many choices an exchange's first round left.

        tokens: any number.
        routes: [M, X]; a choice of -1 is ignored.
        weights: gate and up [P, F, D], down [P, D, F], and gate_bias, up_bias [P, F], down_bias [P, D] if the layer has
            any, in the order of the placement's slots.
        setting: what is fixed at compile time.
        Raises ValueError for devices or a placement that the algorithm does not support.
        """
        ...
