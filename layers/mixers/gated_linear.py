"""Implements gated linear attention: a recurrent state per head, in which every key channel has its own decay.

Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635.

    S_t = diag(a_t) S_{t-1} + k_t^T v_t        a_t = sigmoid(up(down(x_t)) + bias)^(1 / temperature)
    out(norm(scale q_t S_t) * swish(gate(x_t)))

The decay's gate has a low rank; the norm is one RMSNorm for all heads, over each head's channels. The paper has rank
16, temperature 16, keys half as wide as the model, values as wide as it, and scale = key_size^-0.5.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.core.linear import linear
from decodax.core.weight import Weight, fetch_own
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.recurrent import RecurrentUpdate
from decodax.layers.kv_cache.view import CacheView
from decodax.layers.mixers._recurrent import RecurrentConfig
from decodax.layers.norm import Norm
from decodax.layers.recurrence.block import past_of
from decodax.layers.recurrence.linear import linear_recurrence
from decodax.layers.row_parallel import row_parallel_linear


@dataclass(frozen=True)
class GatedLinearConfig(RecurrentConfig):
    """The config of a gated linear attention layer.

    num_heads: N.
    key_size: channels of a key head.
    value_size: channels of a value head.
    gate_rank: R, inner size of the decay's gate.
    gate_temperature: divides the gate's logarithm, so that decays start near 1.
    scale: multiplies query x key.
    norm: of the output.
    """

    num_heads: int
    key_size: int
    value_size: int
    gate_rank: int
    gate_temperature: float
    scale: float
    norm: Norm

    decays_per_channel = True
    has_kernel = True

    def __post_init__(self) -> None:
        sizes = (self.num_heads, self.key_size, self.value_size, self.gate_rank)
        if min(sizes) < 1 or self.gate_temperature <= 0:
            raise ValueError(
                "num_heads, key_size, value_size and gate_rank must be at least 1 and gate_temperature positive, got "
                f"{sizes} and {self.gate_temperature}"
            )

    def weights(self, hidden_size: int) -> dict[str, Any]:
        keys, values = self.num_heads * self.key_size, self.num_heads * self.value_size
        return {
            "query": Weight(("NH", "D"), (keys, hidden_size), block_size=self.key_size),
            "key": Weight(("NH", "D"), (keys, hidden_size), block_size=self.key_size),
            "value": Weight(("NH", "D"), (values, hidden_size), block_size=self.value_size),
            "gate": Weight(("NH", "D"), (values, hidden_size), block_size=self.value_size),
            "decay_down": Weight(("R", "D"), (self.gate_rank, hidden_size)),
            "decay_up": Weight(("NH", "R"), (keys, self.gate_rank), block_size=self.key_size),
            "decay_bias": Weight(("NH",), (keys,), "zeros", block_size=self.key_size),
            "norm": self.norm.weights(self.value_size, "H"),
            "out": Weight(("D", "NH"), (hidden_size, values), block_size=self.value_size),
        }

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return GatedLinear(self, hidden_size, execution, name=name)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.key_size, self.value_size


class GatedLinear(nn.Module):
    """out(norm(linear attention with decay) * swish(gate(x))); positions only from decay."""

    config: GatedLinearConfig
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
        batch, num_tokens, _ = inputs.shape

        def project(name: str, size: int) -> Float[Array, "B T N H"]:
            return linear(inputs, weight[name]).reshape(batch, num_tokens, config.num_heads, size)

        query, key = (project(name, config.key_size) for name in ("query", "key"))
        value, gate = (project(name, config.value_size) for name in ("value", "gate"))
        narrow = linear(inputs, weight["decay_down"])
        decay = linear(narrow, weight["decay_up"], weight["decay_bias"], output_dtype=jnp.float32)
        log_decay = jax.nn.log_sigmoid(decay) / config.gate_temperature
        log_decay = log_decay.reshape(key.shape)
        past = past_of(cache, config.empty_cache(batch, 0, inputs.dtype))
        read = linear_recurrence(
            query, key, value, log_decay, position, mask, past, scale=config.scale, execution=self.execution
        )
        gated = config.norm.module(config.value_size, "H", name="norm")(read) * jax.nn.silu(gate)
        flat = gated.reshape(batch, num_tokens, -1)
        output = row_parallel_linear(flat, weight["out"], axis_name="N", execution=self.execution)
        return output, RecurrentUpdate(key, value, log_decay)
