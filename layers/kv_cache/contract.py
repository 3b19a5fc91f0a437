"""Defines the contract of a KV cache with attention, and of a cache policy with decoding.

A cache is a frozen pytree of fixed-size buffers. Layers `read` it; after verification `commit` returns a new one with
the accepted tokens appended. A policy is a class (or anything with `empty`) that makes caches: full precision or
quantised, all tokens or some of them.

Not every cache supports what some methods need: `Rewindable`, `MarksTokens`, `Splittable` and `HasSlots` say which do.
"""

from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


class Slots(NamedTuple):
    """What a kernel reads of a cache: every slot before `length` holds a token, in the dtype of the queries.

    first, second: of all slots: keys and values [B, K, S, H]; of latent attention latents [B, S, R] and rope keys
        [B, S, H].
    length: filled slots.
    """

    first: Array
    second: Array
    length: Int[Array, " B"]


@runtime_checkable
class ReadableCache(Protocol):
    """What attention reads: keys and values of the past tokens of B rows, for one layer.

    length: tokens written so far.
    capacity: slots, all of which `read` may return.
    """

    @property
    def length(self) -> Int[Array, " B"]: ...

    @property
    def capacity(self) -> int: ...

    def read(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"], Int[Array, "#B S"], Bool[Array, "B #K S"]]:
        """Keys, values, positions and validity of the `num_tokens` slots from `start` on, all within `capacity`."""
        ...


@runtime_checkable
class KeptCache(Protocol):
    """What decoding keeps for a layer: keys and values, or a state."""

    @property
    def length(self) -> Int[Array, " B"]: ...

    @property
    def capacity(self) -> int: ...

    def empty_like(self) -> Self:
        """An empty cache of the same form, for the same rows."""
        ...

    def commit(self, update: Any, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None) -> Self:
        """Appends `count[b]` of a forward's tokens: the first ones, or those in `path[b]`.

        A row that has no room for its tokens fails: its keys become NaN, and with them all that reads them.

        update: the cache update of the forward.
        count: accepted tokens of each row.
        path: indices of the accepted tokens.
        """
        ...


@runtime_checkable
class Cache(ReadableCache, KeptCache, Protocol):
    """A cache of keys and values that attention reads and decoding keeps."""


@runtime_checkable
class Rewindable(Protocol):
    """A cache from which the last tokens can be removed: it stores each separately, unlike a recurrent state."""

    def rewound(self, length: Int[Array, " B"]) -> Self:
        """The cache without the tokens after the first `length[b]` of a row; a row that has fewer is unchanged."""
        ...


@runtime_checkable
class Splittable(Protocol):
    """A cache whose slots may be sharded over devices, the same number of consecutive slots on each."""

    @property
    def capacity(self) -> int: ...

    def shard(self, first: Int[Array, ""]) -> Self:
        """The device's shard, whose slots begin at `first`, as a cache of its own tokens; called within `shard_map`.

        The buffers are the device's already, and `length` is still that of the full cache.
        """
        ...


@runtime_checkable
class HasSlots(Protocol):
    """A cache that kernels may read: `slots` of keys and values, or `latent_slots` of latent attention.

    slots: None where this cache has none, as one that marks tokens.
    """

    @property
    def slots(self) -> Slots | None: ...


@runtime_checkable
class MarksTokens(Protocol):
    """A cache that may hold marks of tokens for which its layer did not run.

    marks_tokens: whether it does. Then `commit` accepts an update whose `kept` is false for some tokens: they count in
        `length`, and no later token attends to them.
    """

    @property
    def marks_tokens(self) -> bool: ...


@runtime_checkable
class CachePolicy(Protocol):
    """Makes empty caches; `KVCache` is one."""

    def empty(self, batch_size: int, num_kv_heads: int, capacity: int, head_size: int, dtype: DTypeLike) -> Cache: ...
