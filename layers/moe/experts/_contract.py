"""What the layer asks of a way to run experts: one result, to rounding, whatever the way."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from decodax.layers.execution import Execution
from decodax.layers.feed_forward import Activation
from decodax.layers.moe.placement import Placement
from decodax.layers.moe.routes import Routes


class Setting(NamedTuple):
    """What is known when a program is compiled. placement: None for experts in their order, one whole in each slot."""

    activation: Activation
    execution: Execution
    placement: Placement | None = None


@runtime_checkable
class WayToRun(Protocol):
    """A frozen dataclass with its options."""

    def run(
        self, tokens: Float[Array, "M D"], routes: Routes, weights: dict[str, Any], setting: Setting
    ) -> tuple[Float[Array, "M D"], Int[Array, ""]]:
        """The sum of each token's experts times their gates, and how many choices an exchange could not take at once.

        tokens: of any number. routes: [M, X]; a choice of -1 counts for nothing.
        weights: gate and up [P, F, D], down [P, D, F], and gate_bias, up_bias [P, F], down_bias [P, D] if the layer has
        any, in the order of the placement's slots.

        Raises ValueError for devices or a placement that the way has no use for.
        """
        ...
