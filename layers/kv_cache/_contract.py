"""What attention asks of a cache, and a decoding run of a cache policy.

A cache is a frozen pytree of fixed-size buffers. Layers `read` it; after verification `commit` gives a new one with the
accepted tokens written behind those it held. A policy is a class (or anything with `empty`) that makes caches: full
precision or quantised, all tokens or some of them.

Not every cache can do what some methods need: `Rewindable`, `MarksTokens` and `Splittable` say which can.
"""

from typing import Any, Protocol, Self, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int


@runtime_checkable
class Cache(Protocol):
    """Keys and values of the past tokens of B rows, for one layer.

    `length` Int[B]: tokens written so far. `capacity`: slots, which is what `read` may ask for.
    """

    @property
    def length(self) -> Int[Array, " B"]: ...

    @property
    def capacity(self) -> int: ...

    def read(
        self, start: Int[Array, ""], num_tokens: int
    ) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"], Int[Array, "#B S"], Bool[Array, "B #K S"]]:
        """Keys, values, positions and validity of `num_tokens` consecutive slots; `start` leaves room for them."""
        ...

    def commit(self, rows: Any, count: Int[Array, " B"], path: Int[Array, "B A"] | None = None) -> Self:
        """Appends `count[b]` of a forward's tokens: the first ones, or those listed in `path[b]`."""
        ...


@runtime_checkable
class Rewindable(Protocol):
    """A cache from which the last tokens can be taken out again: it keeps each by itself, unlike a recurrent state."""

    def rewound(self, length: Int[Array, " B"]) -> Self:
        """The cache without the tokens behind the first `length[b]` of a row; a row that has fewer stays as it is."""
        ...


@runtime_checkable
class Splittable(Protocol):
    """A cache whose slots may lie on several devices, each having as many that follow each other."""

    @property
    def capacity(self) -> int: ...

    def part(self, first: Int[Array, ""]) -> Self:
        """What a device sees of it that has the slots from `first` on, within `shard_map`: a cache of its own tokens.

        The buffers are the device's already, and `length` is still that of the whole cache.
        """
        ...


@runtime_checkable
class MarksTokens(Protocol):
    """A cache that may know of tokens for which its layer did not run.

    marks_tokens: whether it does. Then `commit` takes rows whose `kept` is false for some tokens: they count in
    `length`, and no later token finds anything of them.
    """

    @property
    def marks_tokens(self) -> bool: ...


@runtime_checkable
class CachePolicy(Protocol):
    """What makes empty caches; `KVCache` is one."""

    def empty(self, batch_size: int, num_kv_heads: int, capacity: int, head_size: int, dtype: DTypeLike) -> Cache: ...
