"""Implements lightning attention: a recurrent state per head with a fixed decay, the head's slope.

    S_t = exp(-slope) S_{t-1} + k_t^T v_t        out(norm(q_t S_t) * sigmoid(gate(x_t)))

Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models, arXiv 2401.04658;
TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer, arXiv 2307.14995; MiniMax-01:
Scaling Foundation Models with Lightning Attention, arXiv 2501.08313. The layer is that of MiniMax: an activation on
queries, keys and values, and one RMSNorm over all heads. TransNormerLLM's slopes are implemented; its rotation of
queries and keys (LRPE) in the first layer is not.
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
from decodax.layers.feed_forward import ACTIVATIONS
from decodax.layers.kv_cache.recurrent import RecurrentUpdate
from decodax.layers.kv_cache.view import CacheView
from decodax.layers.mixers._recurrent import RecurrentConfig
from decodax.layers.norm import Norm
from decodax.layers.recurrence.block import past_of
from decodax.layers.recurrence.linear import linear_recurrence
from decodax.layers.row_parallel import row_parallel_linear


def minimax_slopes(num_heads: int, layer: int, num_layers: int) -> tuple[float, ...]:
    """MiniMax's slopes of a layer (0 .. num_layers - 1): ALiBi's, smaller in later layers.

    >>> minimax_slopes(2, 0, 3)
    (0.062500625, 0.0039062890625)
    """
    share = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
    return tuple(2 ** (-8 / num_heads * (head + 1)) * share for head in range(num_heads))


def transnormer_slopes(num_heads: int, layer: int, num_layers: int) -> tuple[float, ...]:
    """The slopes in the text of TransNormerLLM: 8 h / N (1 - l / L); its first head does not decay.

    >>> transnormer_slopes(4, 1, 2)
    (0.0, 1.0, 2.0, 3.0)
    """
    return tuple(8 * head / num_heads * (1 - layer / num_layers) for head in range(num_heads))


@dataclass(frozen=True)
class LightningConfig(RecurrentConfig):
    """The config of a lightning attention layer.

    num_heads: N.
    head_size: of queries, keys and values.
    slopes: one per head, at least 0: minus the logarithm of its decay per token.
    activation: on queries, keys and values, a name of ACTIVATIONS (None: none).
    scale: multiplies query x key.
    norm: of the output.
    """

    num_heads: int
    head_size: int
    slopes: tuple[float, ...]
    activation: str | None
    scale: float
    norm: Norm

    has_kernel = True

    def __post_init__(self) -> None:
        if len(self.slopes) != self.num_heads or min(self.slopes, default=0) < 0:
            raise ValueError(f"slopes must be {self.num_heads} numbers (one per head) of at least 0, got {self.slopes}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be None or one of {sorted(ACTIVATIONS)}, got {self.activation!r}")

    def weights(self, hidden_size: int) -> dict[str, Any]:
        """`query_key_value` holds query, key and value of a head one after the other, head by head."""
        wide = self.num_heads * self.head_size
        return {
            "query_key_value": Weight(("NH", "D"), (3 * wide, hidden_size), block_size=3 * self.head_size),
            "gate": Weight(("NH", "D"), (wide, hidden_size), block_size=self.head_size),
            "norm": self.norm.weights(wide, "NH", self.head_size),
            "out": Weight(("D", "NH"), (hidden_size, wide), block_size=self.head_size),
        }

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return Lightning(self, hidden_size, execution, name=name)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.head_size, self.head_size


class Lightning(nn.Module):
    """out(norm(linear attention with decay) * sigmoid(gate(x))); positions only from decay."""

    config: LightningConfig
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
        heads = linear(inputs, weight["query_key_value"])
        if config.activation is not None:
            heads = ACTIVATIONS[config.activation](heads)
        heads = heads.reshape(batch, num_tokens, config.num_heads, 3, config.head_size)
        query, key, value = (heads[:, :, :, index] for index in range(3))
        log_decay = -jnp.asarray(config.slopes, jnp.float32)[None, None, :, None]
        log_decay = jnp.broadcast_to(log_decay, (batch, num_tokens, config.num_heads, 1))
        past = past_of(cache, config.empty_cache(batch, 0, inputs.dtype))
        read = linear_recurrence(
            query, key, value, log_decay, position, mask, past, scale=config.scale, execution=self.execution
        )
        flat = read.reshape(batch, num_tokens, -1)
        normed = config.norm.module(flat.shape[2], "NH", name="norm")(flat)
        gated = jax.nn.sigmoid(linear(inputs, weight["gate"])) * normed
        output = row_parallel_linear(gated, weight["out"], axis_name="N", execution=self.execution)
        return output, RecurrentUpdate(key, value, log_decay)
