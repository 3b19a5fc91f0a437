"""Shares code between configs of recurrent layers: the cache of fixed size, and its empty updates."""

from jax.typing import DTypeLike

from decodax.layers.kv_cache.contract import CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.layers.kv_cache.recurrent import RecurrentCache, RecurrentUpdate


class RecurrentConfig:
    """The base of these configs, which give the shapes of the state and the tail."""

    decays_per_channel = False  # or one decay per head

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
        """A state of fixed size, and a tail in `dtype`; as in `Mixer.empty_cache`, and `policy` is ignored."""
        return RecurrentCache.empty(batch_size, self.state_shape, capacity, dtype, self.tail_shape)

    def empty_update(self, batch_size: int, num_tokens: int, dtype: DTypeLike) -> RecurrentUpdate:
        return self.empty_cache(batch_size, 0, dtype).empty_update(
            num_tokens, dtype, per_channel=self.decays_per_channel
        )
