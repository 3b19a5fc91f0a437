"""Runs forwards that are batch-invariant: a token's results are the same bits however tokens are cut into forwards.

A matrix product of one row and one of five may add in different orders, so a model run token by token and the same
model run on a draft of five differ in the last bits, and in bfloat16 now and then in the token chosen. In this mode
every forward is cut into tiles of one size, padded if tokens are missing: a tile is TILE_ROWS rows (more only for
larger batches) of one token each, and runs through all layers before the next one. So all products and all sums over
features have one shape, in which a row's result depends neither on the other rows nor on its index; attention does the
same over slots (`layers/attention/attend_invariant.py`). Optimization barriers around a tile keep XLA from fusing
across its border in one program and not in another.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from decodax.layers.attention.attend_invariant import Tile, TileMask
from decodax.layers.attention.mask import Causal, Mask, Tokens
from decodax.layers.kv_cache.full import KVCache, KVUpdate
from decodax.layers.kv_cache.staged import Staged
from decodax.models.transformer import Forward

if TYPE_CHECKING:
    from decodax.models.model import Model

TILE_ROWS = 16

Run = Callable[[Array, Array, Array, tuple[Tile, ...], Mask], Forward]


def apply_in_tiles(
    model: "Model",
    params: dict[str, Any],
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    position: Int[Array, "B T"],
    row_length: Int[Array, "B T"],
    caches: tuple[Any, ...] | None,
    mask: Mask,
    layers: tuple[int, int],
    capture: tuple[int, ...],
) -> Forward:
    """`Model.apply` in the invariant mode; every layer gets its cache as a `Tile`. Arguments as for `Model.apply`."""
    first, last = layers
    is_token = jnp.issubdtype(inputs.dtype, jnp.integer)
    dtype = model.dtype(params) if is_token else inputs.dtype

    def run(inputs, position, row_length, tiles, mask) -> Forward:
        hidden = jax.lax.optimization_barrier(model.embed(params, inputs, position)) if is_token else inputs
        captured, updates = {first: hidden} if first in capture else {}, []
        for index, tile in enumerate(tiles, start=first):
            one_layer = (index, index + 1)
            reads = (None,) * index + (tile,)
            out = model.run_method(params, "run", hidden, position, row_length, reads, mask, one_layer, ())
            # The barrier makes a layer the same computation whatever range of layers it is run in.
            hidden = jax.lax.optimization_barrier(out.hidden)
            updates.extend(out.cache_updates)
            if index + 1 in capture:
                captured[index + 1] = hidden
        return Forward(hidden, tuple(updates), captured)

    def empty_update(num_tokens: int) -> tuple[Any, ...]:
        return model.empty_update(inputs.shape[0], num_tokens, dtype)[first:last]

    caches = (None,) * (last - first) if caches is None else caches[first:last]
    return run_in_tiles(run, inputs, position, row_length, caches, mask, empty_update)


def run_in_tiles(
    run: Run,
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    position: Int[Array, "B T"],
    row_length: Int[Array, "B T"],
    caches: tuple[Any, ...],
    mask: Mask,
    empty_update: Callable[[int], tuple[KVUpdate, ...]],
) -> Forward:
    """The forward over all tokens, tile by tile.

    run: runs the layers of `caches` over one tile, given as [R, 1].
    inputs, position, row_length, mask: as for `Model.apply`.
    caches: of the layers that run.
    empty_update: (num_tokens) -> room for the layers' cache updates.
    Raises ValueError for caches that do not return keys and values as committed, and for a mask with which a token
    attends to later ones.
    """
    if mask.attends_ahead:
        raise ValueError(
            f"the invariant mode runs tokens in order, and {type(mask).__name__} lets them attend to later ones: use "
            "another mask, or invariant=False"
        )
    batch, num_tokens = position.shape
    bare, staged, staged_position = _unstage(caches)
    is_chain = isinstance(mask, Causal)
    per_tile = max(1, TILE_ROWS // batch)
    if num_tokens <= per_tile:
        tiles = tuple(
            Tile(cache, update, staged_position, batch, num_tokens, is_chain)
            for cache, update in zip(bare, staged, strict=True)
        )
        return _run_tile(run, inputs, position, row_length, tiles, mask)

    num_tiles = -(-num_tokens // per_tile)
    padded_tokens = num_tiles * per_tile
    padded_position = _pad(position, 1, padded_tokens, fill=-1)
    allowed = None if is_chain else _allowed_in_tiles(mask, position, staged_position, per_tile, num_tiles)

    def step(updates: tuple[KVUpdate, ...], tile_inputs: Any) -> tuple[tuple[KVUpdate, ...], Any]:
        start, inputs, position, row_length, allowed = tile_inputs
        is_earlier = jnp.arange(padded_tokens) < start
        before = jnp.where(is_earlier[None, :], padded_position, -1)
        before = before if staged_position is None else jnp.concatenate([staged_position, before], axis=1)
        tiles = tuple(
            Tile(cache, _appended(waiting, update), before, batch, per_tile, is_chain)
            for cache, waiting, update in zip(bare, staged, updates, strict=True)
        )
        tile_mask = mask if allowed is None else TileMask(mask, allowed)
        out = _run_tile(run, inputs, position, row_length, tiles, tile_mask)
        slot = start + jnp.arange(per_tile, dtype=jnp.int32)
        updates = tuple(update.place(new, slot) for update, new in zip(updates, out.cache_updates, strict=True))
        return updates, (out.hidden, out.captured)

    start = jnp.arange(num_tiles, dtype=jnp.int32) * per_tile
    per_token = (_cut(inputs, num_tiles, per_tile), _cut(position, num_tiles, per_tile, fill=-1))
    per_token = (*per_token, _cut(row_length, num_tiles, per_tile, fill=1))
    updates, (hidden, captured) = jax.lax.scan(step, empty_update(padded_tokens), (start, *per_token, allowed))

    def join(tiles: Array) -> Array:
        joined = jnp.moveaxis(tiles, 0, 1)
        return joined.reshape(batch, padded_tokens, *tiles.shape[3:])[:, :num_tokens]

    updates = jax.tree.map(lambda leaf: leaf[:, :, :num_tokens], updates)
    return Forward(join(hidden), updates, jax.tree.map(join, captured))


def logits_in_tiles(head: Callable[[Array], Array], hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """`head` ([R, 1, D] to [R, 1, V]) of all tokens, TILE_ROWS at a time."""
    rows = hidden.reshape(-1, 1, hidden.shape[-1])
    num_tiles = -(-rows.shape[0] // TILE_ROWS)
    tiles = _pad(rows, 0, num_tiles * TILE_ROWS).reshape(num_tiles, TILE_ROWS, 1, -1)

    def of_tile(tile: Array) -> Array:
        return jax.lax.optimization_barrier(head(jax.lax.optimization_barrier(tile)))

    logits = of_tile(tiles[0])[None] if num_tiles == 1 else jax.lax.map(of_tile, tiles)
    return logits.reshape(num_tiles * TILE_ROWS, -1)[: rows.shape[0]].reshape(*hidden.shape[:2], -1)


def _run_tile(
    run: Run, inputs: Array, position: Array, row_length: Array, tiles: tuple[Tile, ...], mask: Mask
) -> Forward:
    """Runs [B, T] tokens as the rows of one tile and returns the result as [B, T, ...]."""
    batch, num_tokens = position.shape
    size = -(-batch * max(1, TILE_ROWS // batch) // TILE_ROWS) * TILE_ROWS

    def as_rows(per_token: Array) -> Array:
        return _pad(per_token.reshape(batch * num_tokens, 1, *per_token.shape[2:]), 0, size)

    inputs, at, in_row = jax.lax.optimization_barrier((as_rows(inputs), as_rows(position), as_rows(row_length)))
    out = jax.lax.optimization_barrier(run(inputs, at, in_row, tiles, mask))

    def as_tokens(rows: Array) -> Array:
        return rows[: batch * num_tokens].reshape(batch, num_tokens, rows.shape[-1])

    updates = tuple(tile.new_rows(new) for tile, new in zip(tiles, out.cache_updates, strict=True))
    return Forward(as_tokens(out.hidden), updates, jax.tree.map(as_tokens, out.captured))


def _unstage(caches: tuple[Any, ...]) -> tuple[tuple[KVCache | None, ...], tuple[KVUpdate | None, ...], Array | None]:
    """The bare caches, the updates staged with them, and the staged tokens' positions."""
    bare: tuple[Any, ...] = tuple(cache.cache if isinstance(cache, Staged) else cache for cache in caches)
    for cache in bare:
        if cache is not None and type(cache) is not KVCache:
            raise ValueError(
                "the invariant mode needs caches that return keys and values as committed (KVCache), got "
                f"{type(cache).__name__}: use the default cache policy, or a model with invariant=False"
            )
    staged = tuple(cache.update if isinstance(cache, Staged) else None for cache in caches)
    position = next((cache.position for cache in caches if isinstance(cache, Staged)), None)
    return bare, staged, position


def _appended(staged: KVUpdate | None, update: KVUpdate) -> KVUpdate:
    """`update` after the staged tokens."""
    if staged is None:
        return update
    pairs = ((staged.key, update.key), (staged.value, update.value))
    return KVUpdate(*(jnp.concatenate([old.astype(new.dtype), new], axis=2) for old, new in pairs))


def _allowed_in_tiles(
    mask: Mask, position: Int[Array, "B T"], staged_position: Int[Array, "B U"] | None, per_tile: int, num_tiles: int
) -> Array:
    """Each tile's mask of new tokens, [tiles, #B, tokens of a tile, keys]; keys: staged, all, then the tile's own."""
    keys = position if staged_position is None else jnp.concatenate([staged_position, position], axis=1)
    num_staged = keys.shape[1] - position.shape[1]
    allowed = mask.allows(Tokens(position, is_new=True), Tokens(keys, is_new=True))
    allowed = _pad(allowed, 2, num_staged + num_tiles * per_tile)
    allowed = _cut(allowed, num_tiles, per_tile)
    own = [allowed[i, :, :, num_staged + i * per_tile :][:, :, :per_tile] for i in range(num_tiles)]
    return jnp.concatenate([allowed, jnp.stack(own)], axis=3)


def _pad(array: Array, axis: int, size: int, fill: int = 0) -> Array:
    widths = [(0, size - length if index == axis else 0) for index, length in enumerate(array.shape)]
    return jnp.pad(array, widths, constant_values=fill)


def _cut(per_token: Array, num_tiles: int, per_tile: int, fill: int = 0) -> Array:
    """[B, T, ...] to [tiles, B, tokens of a tile, ...]."""
    padded = _pad(per_token, 1, num_tiles * per_tile, fill)
    return jnp.moveaxis(padded.reshape(padded.shape[0], num_tiles, per_tile, *padded.shape[2:]), 1, 0)
