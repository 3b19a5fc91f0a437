"""Shares code between configs of recurrent layers: the cache of fixed size, and its empty updates."""

import math

import jax
from jax.typing import DTypeLike

from decodax.kernels_pallas.selection import KernelSelection
from decodax.layers.execution import ON_THIS_DEVICE, Execution
from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache, MarkedCache
from decodax.layers.kv_cache.recurrent import RecurrentCache, RecurrentUpdate
from decodax.layers.mixers.contract import MixingCost


class RecurrentConfig:
    """The base of these configs, which give the shapes of the state and the tail."""

    decays_per_channel = False  # or one decay per head
    has_kernel = False

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, channels of a key, channels of a value."""
        raise NotImplementedError

    @property
    def tail_shape(self) -> tuple[int, int] | None:
        """Past tokens and channels that a convolution reads, None without one."""
        return None

    def empty_cache(
        self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache
    ) -> RecurrentCache:
        """A state of fixed size, and a tail in `dtype`; as in `Mixer.empty_cache`."""
        return RecurrentCache.empty(batch_size, self.state_shape, capacity, dtype, self.tail_shape)

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> RecurrentUpdate:
        return self.empty_cache(batch_size, 0, dtype).empty_update(
            num_tokens, dtype, per_channel=self.decays_per_channel
        )

    def unsupported_policy_reason(self, policy: CachePolicy) -> str | None:
        own = policy in (KVCache, MarkedCache)  # a token that is not kept changes no state
        return None if own else "a recurrent layer has a state, and no keys and values"

    def invariant_unsupported_reason(self) -> str | None:
        return "a recurrent layer adds up its tokens in chunks"

    def mixing_cost(self, num_new: int, num_cached: int) -> MixingCost:
        """Decay, update and read of the state."""
        return MixingCost(6 * math.prod(self.state_shape), 0)

    def kernel(
        self, batch_size: int, num_new: int, capacity: int, dtype: DTypeLike, execution: Execution = ON_THIS_DEVICE
    ) -> KernelSelection:
        """Of linear attention with decay, for several tokens; other recurrences say that they have none."""
        if num_new == 1 or not self.has_kernel:
            return KernelSelection("xla", f"there is no kernel for {type(self).__name__} on {num_new} tokens")
        from decodax.kernels_pallas.linear_attention import select_linear_attention  # late, as it is seldom asked

        num_heads, key_size, value_size = self.state_shape
        key, value, decay = (
            jax.ShapeDtypeStruct((batch_size, num_new, num_heads, size), kind)
            for size, kind in (
                (key_size, dtype),
                (value_size, dtype),
                (key_size if self.decays_per_channel else 1, "float32"),
            )
        )
        return select_linear_attention(key, key, value, decay, implementation=execution.implementation)
