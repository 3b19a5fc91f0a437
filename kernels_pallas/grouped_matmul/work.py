"""Makes the work list of a grouped matmul: which tiles of rows are multiplied with which group's weights, in order.

Tokens are sorted by group, and groups begin and end anywhere. An item is a tile of consecutive rows, of which only rows
first .. last - 1 belong to the item's group; rows after the last group belong to none and are zeros in the result.
Items with a product come first, then those that write zeros, then padding up to a length known at compile time. Empty
groups have no items. (MegaBlocks, arXiv 2211.15841, has such lists of blocks; how items are counted differs.)

    group of each row                                   0 0 0 0 0 1 1 3 3 3 3 - - -
    rows that tiles of four begin at, multiple = 4      0: 0, 4: 0, 4: 1, 4: 3, 8: 3, 8: -, 12: -
    the same, multiple = 1                              0: 0, 4: 0, 5: 1, 7: 3, 11: -
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class WorkList(NamedTuple):
    """Items in order of their rows; a padding item repeats the one before it.

    row: where the tile begins.
    group: of the weights; if none are needed, that of the item before.
    first, last: the rows first .. last - 1 are the item's own; the tile may begin before them.
    counts: items with a product, items with a product or zeros.
    """

    row: Int[Array, " items"]
    group: Int[Array, " items"]
    first: Int[Array, " items"]
    last: Int[Array, " items"]
    counts: Int[Array, " 2"]


def work_list(group_sizes: Int[Array, " E"], num_rows: int, tile_rows: int, *, multiple: int) -> WorkList:
    """The items for tiles of rows.

    group_sizes: rows per group; negative sizes, and rows beyond `num_rows`, are cut.
    num_rows: of all tokens.
    tile_rows: of a tile.
    multiple: of which each tile begins at one, a divisor of `tile_rows`: the last before its group, or after the tile
        before it.
    """
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes.astype(jnp.int32), 0)), num_rows)
    ends = jnp.concatenate([ends, jnp.full((1,), num_rows, jnp.int32)])
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends[:-1]])
    origins = starts // multiple * multiple
    num_tiles = jnp.where(ends > starts, (ends - origins + tile_rows - 1) // tile_rows, 0)
    items_through = jnp.cumsum(num_tiles)
    num_items, num_products = items_through[-1], items_through[-2]

    item = jnp.minimum(jnp.arange(most_items(num_rows, len(group_sizes), tile_rows, multiple)), num_items - 1)
    owner = jnp.searchsorted(items_through, item, side="right", method="compare_all").astype(jnp.int32)
    row = origins[owner] + (item - items_through[owner] + num_tiles[owner]) * tile_rows
    last_with_weights = owner[jnp.maximum(num_products - 1, 0)]
    group = jnp.minimum(jnp.where(item < num_products, owner, last_with_weights), len(group_sizes) - 1)
    first, last = jnp.maximum(row, starts[owner]), jnp.minimum(row + tile_rows, ends[owner])
    return WorkList(row, group, first, last, jnp.stack([num_products, num_items]))


def most_items(num_rows: int, num_groups: int, tile_rows: int, multiple: int) -> int:
    """The length of a work list: enough for any group sizes; rows of no group count as one more group.

    num_rows, num_groups: of the tokens.
    tile_rows, multiple: as for `work_list`.
    """
    if multiple == tile_rows:  # tiles are the same for all groups, and each boundary adds one item
        return min(num_rows, -(-num_rows // tile_rows) + num_groups)
    foreign_rows = (multiple - 1) * (num_groups + 1)  # before the first own row of each group
    return min(num_rows, (num_rows + foreign_rows) // tile_rows + num_groups + 1)


def power_of_two(value: float, smallest: int, largest: int) -> int:
    """The power of two at or above `value`, within bounds that are powers of two: a tile for groups of that size."""
    tile = smallest
    while tile < min(value, largest):
        tile *= 2
    return tile


def rows_per_group(tokens: Any, weight: Any) -> float:
    """Number of rows per group if all have the same number."""
    return tokens.shape[0] / weight.shape[0]
