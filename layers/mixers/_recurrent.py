"""What the configs of recurrent layers share: a cache of one size however long a text is, and room for its rows."""

from jax.typing import DTypeLike

from decodax.layers.kv_cache._contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.recurrent import RecurrentCache, RecurrentRows


class RecurrentConfig:
    """A mixer's config says the shape of its state, and what else its cache and rows have."""

    decays_per_channel = False  # or one decay per head

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, channels of a key, channels of a value."""
        raise NotImplementedError

    @property
    def tail_shape(self) -> tuple[int, int] | None:
        """Tokens and channels that a convolution reads of the past, None without one."""
        return None

    def empty_cache(
        self, batch_size: int, capacity: int, dtype: DTypeLike, policy: CachePolicy = KVCache
    ) -> RecurrentCache:
        """A state of fixed size, and a tail in `dtype`; `policy` is for layers that keep tokens."""
        return RecurrentCache.empty(batch_size, self.state_shape, capacity, dtype, self.tail_shape)

    def empty_rows(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> RecurrentRows:
        return self.empty_cache(batch_size, 0, dtype).empty_rows(num_tokens, dtype, per_channel=self.decays_per_channel)
