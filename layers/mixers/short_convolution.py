"""Implements the gated short convolution of LFM2: a layer whose only memory is the last few tokens.

LFM2 Technical Report, arXiv 2511.23404.

    out(c_t * sum_i w_i * (b_(t-i) * x_(t-i)))        b, c, x: projections of the input; w: W taps per channel
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.linear import linear
from decodax.core.weight import Weight, fetch_own
from decodax.layers.attention.mask import Mask
from decodax.layers.attention.predecessors import predecessors
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.recurrent import RecurrentUpdate
from decodax.layers.kv_cache.view import CacheView
from decodax.layers.mixers._recurrent import RecurrentConfig
from decodax.layers.mixers.contract import MixingCost
from decodax.layers.recurrence.block import past_of
from decodax.layers.row_parallel import row_parallel_linear

_PROJECTIONS = ("input_gate", "output_gate", "value")


@dataclass(frozen=True)
class ShortConvolutionConfig(RecurrentConfig):
    """The config of a gated short convolution.

    num_channels: H, of the convolution.
    width: W, tokens that it reads, its own included.
    bias: of the projections and the convolution.
    """

    num_channels: int
    width: int
    bias: bool = False

    def __post_init__(self) -> None:
        if self.width < 2:
            raise ValueError(f"width must be at least 2 tokens, got {self.width}")

    def weights(self, hidden_size: int) -> dict[str, Any]:
        size = self.num_channels
        weights: dict[str, Any] = {name: Weight(("NH", "D"), (size, hidden_size)) for name in _PROJECTIONS}
        weights["convolution"] = Weight(("H", "W"), (size, self.width))
        weights["out"] = Weight(("D", "NH"), (hidden_size, size))
        if self.bias:
            weights |= {f"{name}_bias": Weight(("NH",), (size,), "zeros") for name in _PROJECTIONS}
            weights["convolution_bias"] = Weight(("H",), (size,), "zeros")
            weights["out_bias"] = Weight(("D",), (hidden_size,), "zeros")
        return weights

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return ShortConvolution(self, hidden_size, execution, name=name)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """There is no state beside the tail."""
        return 0, 0, 0

    @property
    def tail_shape(self) -> tuple[int, int]:
        return self.width - 1, self.num_channels

    def mixing_cost(self, num_new: int, num_cached: int) -> MixingCost:
        """The taps of every channel, and its two gates."""
        return MixingCost(2 * (self.width + 1) * self.num_channels, 0)


class ShortConvolution(nn.Module):
    """out(c * convolution(b * x)); positions only from the convolution."""

    config: ShortConvolutionConfig
    hidden_size: int
    execution: Execution

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        row_length: Int[Array, "B T"],
        cache: CacheView,
        mask: Mask,
    ) -> tuple[Float[Array, "B T D"], RecurrentUpdate]:
        config = self.config
        weight = fetch_own(self, config.weights(self.hidden_size))
        inputs = self.execution.gathered_tokens(inputs)
        input_gate, output_gate, value = (
            self.execution.gathered_tokens(linear(inputs, weight[name], weight.get(f"{name}_bias")))
            for name in _PROJECTIONS
        )
        update = config.empty_update(inputs.shape[0], inputs.shape[1], inputs.dtype)
        past = past_of(cache, config.empty_cache(inputs.shape[0], 0, inputs.dtype))
        past.reads(position, mask)  # refuses a mask that lets a token read later ones
        assert past.cache.tail is not None
        columns = self.execution.split(input_gate * value, "B _ _")
        window = predecessors(columns, position, mask, past.cache.tail, past.columns)
        convolved = jnp.einsum("btwc,cw->btc", window, weight["convolution"], preferred_element_type=jnp.float32)
        if config.bias:
            convolved = convolved + weight["convolution_bias"].astype(jnp.float32)[None, None]
        convolved = self.execution.split(convolved, "B _ _")  # or the cache's columns would be split by the gate
        mixed = output_gate * convolved.astype(inputs.dtype)
        output = row_parallel_linear(
            mixed, weight["out"], weight.get("out_bias"), axis_name="N", execution=self.execution
        )
        return output, RecurrentUpdate(update.key, update.value, update.log_decay, columns)
