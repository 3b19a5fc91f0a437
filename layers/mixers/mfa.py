"""Implements multi-matrix factorization attention: low-rank query heads that share one large key and value head.

Multi-matrix Factorization Attention, arXiv 2412.19255; Step-3 is Large yet Affordable: Model-system Co-design for
Cost-effective Decoding, arXiv 2507.19427. The norm between the two query matrices is Step-3's. The variant that
computes values from the keys (MFA-KR) is not implemented.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from decodax.core.linear import linear
from decodax.core.weight import Weight, fetch_own
from decodax.layers.attention.attend import attend
from decodax.layers.attention.mask import Mask
from decodax.layers.execution import Execution
from decodax.layers.kv_cache.full import KVUpdate
from decodax.layers.kv_cache.view import CacheView
from decodax.layers.mixers._attention import AttentionConfig
from decodax.layers.norm import Norm
from decodax.layers.rope import Rope
from decodax.layers.row_parallel import row_parallel_linear


@dataclass(frozen=True)
class MFAConfig(AttentionConfig):
    """The config of multi-matrix factorization attention.

    num_heads, head_size: N, H.
    query_rank: inner size of the query projection.
    rope: rotary embedding of queries and keys.
    scale: multiplies query x key.
    norm: between the two query matrices.
    """

    num_heads: int
    head_size: int
    query_rank: int
    rope: Rope
    scale: float
    norm: Norm

    num_kv_heads = 1
    window = None

    def __post_init__(self) -> None:
        if self.rope.rotary_size > self.head_size:
            raise ValueError(f"rotary_size must be at most the head size {self.head_size}, got {self.rope.rotary_size}")

    def weights(self, hidden_size: int) -> dict[str, Any]:
        """Keys and values have one head, replicated on every device with query heads."""
        wide, size, rank = self.num_heads * self.head_size, self.head_size, self.query_rank
        return {
            "query_down": Weight(("R", "D"), (rank, hidden_size)),
            "query_norm": self.norm.weights(rank, "R"),
            "query_up": Weight(("NH", "R"), (wide, rank), block_size=size),
            "key": Weight(("H", "D"), (size, hidden_size)),
            "value": Weight(("H", "D"), (size, hidden_size)),
            "out": Weight(("D", "NH"), (hidden_size, wide), block_size=size),
        }

    def module(self, hidden_size: int, name: str, execution: Execution) -> nn.Module:
        return MFA(self, hidden_size, execution, name=name)

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> KVUpdate:
        return KVUpdate.empty(batch_size, 1, num_tokens, self.head_size, dtype)


class MFA(nn.Module):
    """out(attend(rope(query_up(norm(query_down(x)))), rope(key(x)), value(x))): all heads share one key and one value.

    Reads the cache, returns the output and the cache update.
    """

    config: MFAConfig
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
    ) -> tuple[Float[Array, "B T D"], KVUpdate]:
        config = self.config
        weight = fetch_own(self, config.weights(self.hidden_size))

        compressed = linear(inputs, weight["query_down"])
        compressed = config.norm.module(config.query_rank, "R", name="query_norm")(compressed)
        query = linear(compressed, weight["query_up"]).reshape(*inputs.shape[:2], config.num_heads, -1)
        rotated = config.rope.rotation(position, row_length)
        query = rotated(query)
        key = rotated(linear(inputs, weight["key"])[:, :, None])
        key, value = jnp.moveaxis(key, 1, 2), linear(inputs, weight["value"])[:, None]
        scores = {"scale": config.scale, "softcap": None}
        mixed, _ = attend(query, key, value, position, mask, cache, execution=self.execution, **scores)
        flat = mixed.reshape(*inputs.shape[:2], -1)
        return row_parallel_linear(flat, weight["out"], axis_name="N", execution=self.execution), KVUpdate(key, value)
