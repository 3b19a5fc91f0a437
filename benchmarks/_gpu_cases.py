"""Lists the odd sizes at which a kernel's values are compared on a GPU that it has never run on, and poisons the rest.

The sizes are those at which hardware and interpreter may differ: groups that begin at any row, one row more or less
than a tile, empty rows, columns that leave half a block, more rows than programs, more programs than rows. What no
query attends to is NaN: slots after the lengths, tokens of no group, pages of no list.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._bench_kernel_cases import Case
from decodax.kernels_pallas import KERNELS
from decodax.kernels_pallas.block_sparse_prefill.shapes import BlockSparseShape
from decodax.kernels_pallas.flash_decode.shapes import Shape as DecodeShape
from decodax.kernels_pallas.flash_prefill.shapes import Shape as PrefillShape
from decodax.kernels_pallas.gather_decode.shapes import Shape as GatherShape
from decodax.kernels_pallas.grouped_matmul.shapes import Shape as GroupedShape
from decodax.kernels_pallas.linear_attention.shapes import Shape as LinearShape
from decodax.kernels_pallas.mla_decode.new_latents import NewLatents
from decodax.kernels_pallas.mla_decode.shapes import Shape as LatentShape
from decodax.kernels_pallas.paged_decode.shapes import Shape as PagedShape

Poison = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]  # operands, options -> replaced operands
F16 = "float16"


@dataclasses.dataclass(frozen=True)
class ValueCase:
    """Operands of a kernel.

    shape: of the kernel's `shapes.py`.
    replaced: operands with other values than the shape's own, or besides them.
    changed: options with other values than the shape's own.
    """

    shape: Any
    replaced: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    changed: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def operands(self, kernel: str) -> dict[str, Any]:
        """Random operands; nothing is poisoned."""
        arrays = {name: value for name, value in self.replaced.items() if not callable(value)}
        operands = Case(kernel, "", self.shape, replaced=arrays).operands(0)
        return operands | {name: make(operands) for name, make in self.replaced.items() if callable(make)}

    def options(self) -> dict[str, Any]:
        return {**self.shape.options(), **self.changed}


def _decode(lengths: Sequence[int], *, num_queries: int = 1, kind: Any = DecodeShape, **sizes: Any) -> ValueCase:
    """Rows of these lengths; each query's window ends at itself."""
    taken = {"num_heads": 8, "num_kv_heads": 2, "head_size": 64, "capacity": 256, **sizes}
    taken = {"value_size": taken["head_size"], "length": taken["capacity"], **taken}
    shape = kind(batch=len(lengths), num_queries=num_queries, **taken)
    length, replaced = np.asarray(lengths, np.int32), {}
    if kind is PagedShape:
        replaced["length"] = np.tile(length[:, None], shape.num_kv_heads if shape.per_head else 1)
    else:
        replaced["length"] = length
    if kind is GatherShape:
        lists = np.arange(len(lengths) * shape.num_kv_heads, dtype=np.int32)
        replaced["count"] = (lists % (shape.num_listed + 1)).reshape(len(lengths), -1)
    if shape.window is not None:
        replaced["first"] = length[:, None] + np.arange(num_queries, dtype=np.int32) - shape.window + 1
    return ValueCase(shape, replaced)


def _prefill(num_queries: int, num_keys: int, replaced: Mapping[str, Any], *, batch: int, **sizes: Any) -> ValueCase:
    taken = {"num_heads": 2, "num_kv_heads": 1, "head_size": 64, **sizes}
    taken = {"value_size": taken["head_size"], **taken}
    causal = taken.pop("causal", True)
    return ValueCase(PrefillShape(batch, num_queries, num_keys, **taken), replaced, {"causal": causal})


def _latent(lengths: Sequence[int], num_queries: int, num_heads: int, rank: int, **more: Any) -> ValueCase:
    num_new = more.pop("num_new", None)
    shape = LatentShape(len(lengths), num_queries, num_heads, rank, 64, 256, 256, 192, **more)
    replaced: dict[str, Any] = {"length": np.asarray(lengths, np.int32)}
    if num_new is not None:
        replaced["new"] = lambda operands: _new_latents(operands, num_new)
    return ValueCase(shape, replaced)


def _new_latents(operands: Mapping[str, Any], num_new: int) -> NewLatents:
    """A chain whose last tokens are the queries."""
    batch, num_queries = operands["query_latent"].shape[:2]
    seeds = jax.random.split(jax.random.key(7), 2)
    made = [
        jax.random.normal(seed, (batch, num_new, like.shape[2]), like.dtype)
        for seed, like in zip(seeds, operands["new"][:2], strict=True)
    ]
    last = num_new - num_queries + np.arange(num_queries)
    allowed = np.broadcast_to(np.arange(num_new) <= last[:, None], (batch, num_queries, num_new))
    return NewLatents(*made, jnp.asarray(allowed))


def _grouped(group_sizes: Sequence[int], *, gated: bool = False, rest: int = 0, **sizes: Any) -> ValueCase:
    """Groups of these sizes, then `rest` rows of none."""
    taken = {"input_size": 64, "output_size": 64, **sizes}
    shape = GroupedShape(sum(group_sizes) + rest, len(group_sizes), 1, gated=gated, **taken)
    return ValueCase(shape, {"group_sizes": np.asarray(group_sizes, np.int32)})


def _groupings(gated: bool) -> dict[str, ValueCase]:
    """The first two differ only in where the groups begin: tiles of shared memory have 8 rows."""
    many = [1 + 7 * number % 26 for number in range(160)]
    cases = {
        "groups from any row": _grouped([5, 11, 48], gated=gated),
        "groups from every eighth row": _grouped([8, 8, 48], gated=gated),
        "single rows": _grouped([1, 0, 62, 1], gated=gated),
        "rows of nobody": _grouped([3, 0, 10], gated=gated, rest=27),
        "1408 columns, odd groups": _grouped([9, 8, 130], gated=gated, output_size=1408),
        "more jobs than programs": _grouped(many, gated=gated, input_size=448, output_size=256),
    }
    return cases if gated else {**cases, "float16": _grouped([5, 11, 48], dtype=F16, output_size=192)}


_ENDS = (0, 1, 63, 64, 65, 200)  # lengths around a tile
_PACKED = np.repeat(np.arange(4), (1, 63, 70, 66))[None]  # segments of 200 tokens
_CACHED = np.asarray((447, 0, 1, 64, 448), np.int32)

CASES: dict[str, dict[str, ValueCase]] = {
    "grouped_matmul": _groupings(gated=False),
    "grouped_gate_up": _groupings(gated=True),
    "flash_decode": {
        "ends of tiles": _decode(_ENDS, capacity=200),
        "chain of 8": _decode(_ENDS, capacity=200, num_queries=8, num_staged=8),
        "tree of 64": _decode((0, 65, 256), num_queries=64),
        "more rows than programs": _decode([(37 * row) % 257 for row in range(80)], num_kv_heads=8),
        "more programs than rows": _decode((32700,), capacity=32768, num_heads=2, num_kv_heads=1),
        "window, sinks, soft-cap": _decode(
            _ENDS, num_queries=3, window=70, num_sink_tokens=5, softcap=20.0, has_sink_logits=True
        ),
        "heads of 80": _decode(_ENDS, head_size=80),
        "heads of 96": _decode(_ENDS, head_size=96),
        "keys of 192, values of 128": _decode(_ENDS, head_size=192, value_size=128),
        "heads of 256": _decode(_ENDS, head_size=256),
        "float16": _decode(_ENDS, dtype=F16),
    },
    "paged_decode": {
        f"pages of {page_tokens}": _decode(_ENDS, kind=PagedShape, page_tokens=page_tokens, num_queries=2)
        for page_tokens in (16, 8, 64, 256)
    }
    | {"a table per head": _decode(_ENDS, kind=PagedShape, page_tokens=16, per_head=True, window=70)},
    "gather_decode": {
        f"pages of {block_tokens}": _decode(
            _ENDS, kind=GatherShape, block_tokens=block_tokens, num_listed=256 // block_tokens
        )
        for block_tokens in (32, 8, 128)
    },
    "mla_decode": {
        "16 heads, rank 128": _latent(_ENDS, 1, 16, 128),
        "16 heads": _latent(_ENDS, 1, 16, 512),
        "128 heads": _latent(_ENDS, 1, 128, 512),
        "4 queries of 16 heads, 65 new tokens": _latent(_ENDS, 4, 16, 512, num_new=65),
        "more rows than programs": _latent([(37 * row) % 257 for row in range(150)], 1, 64, 256),
        "float16": _latent(_ENDS, 1, 16, 512, dtype=F16),
    },
    "flash_prefill": {
        "64 queries": _prefill(64, 64, {}, batch=1),
        "two warpgroups": _prefill(128, 128, {}, batch=3, num_heads=64, num_kv_heads=8),
        "causal at any block": _prefill(
            320, 448, {"offset": (0, 37, 64, 100, 127), "length": (320, 357, 384, 420, 447)}, batch=5
        ),
        "a cache": _prefill(100, 448, {"offset": _CACHED, "length": _CACHED}, batch=5),
        "not causal": _prefill(100, 448, {"length": _CACHED}, batch=5, causal=False),
        "window, sinks, soft-cap": _prefill(
            200, 200, {}, batch=2, window=70, num_sink_tokens=5, softcap=20.0, has_sink_logits=True
        ),
        "segments": _prefill(200, 200, {"query_segments": _PACKED, "key_segments": _PACKED}, batch=1),
        "heads of 80": _prefill(200, 200, {}, batch=2, head_size=80),
        "heads of 96": _prefill(200, 200, {}, batch=2, head_size=96),
        "keys of 192, values of 128": _prefill(200, 200, {}, batch=2, head_size=192, value_size=128),
        "heads of 256": _prefill(200, 200, {}, batch=2, head_size=256),
        "float16": _prefill(200, 200, {}, batch=2, dtype=F16),
    },
    "block_sparse_prefill": {
        "blocks of 64, 72 slots": ValueCase(
            BlockSparseShape(72, 2, 1, 64, num_lists=2, query_block=64, key_block=64), {"length": (71,)}
        ),
        "blocks of 128, after a cache": ValueCase(
            BlockSparseShape(320, 4, 2, 128, num_lists=2, fraction=0.5, batch=2, offset=192), {"length": (512, 450)}
        ),
        "keys of 192, values of 128": ValueCase(
            BlockSparseShape(256, 2, 2, 192, num_lists=2, fraction=0.5, value_size=128, softcap=20.0)
        ),
    },
    "linear_attention": {
        "a decay per head": ValueCase(LinearShape(6, 100, 2, 64, 64, per_channel=False), {"length": (*_ENDS[:5], 100)}),
        "a decay per channel": ValueCase(
            LinearShape(6, 100, 2, 128, 64, per_channel=True), {"length": (*_ENDS[:5], 100)}
        ),
        "float16": ValueCase(LinearShape(2, 130, 2, 64, 128, per_channel=False, dtype=F16)),
    },
}
# Run again and again: more programs than the 264 that a GPU of 132 cores runs two of at once.
REPEATED: dict[str, ValueCase] = {
    "grouped_matmul": CASES["grouped_matmul"]["more jobs than programs"],
    "grouped_gate_up": CASES["grouped_gate_up"]["more jobs than programs"],
    "flash_decode": _decode([(997 * row) % 4097 for row in range(48)], num_kv_heads=8, capacity=4096),
    "paged_decode": _decode([(997 * row) % 4097 for row in range(48)], kind=PagedShape, num_kv_heads=8, capacity=4096),
    "gather_decode": _decode([4096] * 48, kind=GatherShape, num_kv_heads=8, capacity=4096),
    "mla_decode": _latent([(37 * row) % 257 for row in range(300)], 1, 64, 512),
    "flash_prefill": _prefill(1024, 1024, {}, batch=2, num_heads=32, num_kv_heads=8, head_size=128),
    "block_sparse_prefill": ValueCase(BlockSparseShape(4096, 32, 8, 128, num_lists=8, fraction=0.3)),
    "linear_attention": ValueCase(LinearShape(4, 512, 80, 128, 64, per_channel=False)),
}
# Named shapes of the kernels' benchmark to time, the most telling first.
TIMED: tuple[tuple[str, str], ...] = (
    ("flash_decode", "llama3-8b decode, batch 8, 32k"),
    ("flash_prefill", "llama3-8b prefill, 16k"),
    ("mla_decode", "deepseek-v3 decode, heads over eight devices, batch 64, 4k"),
    ("grouped_matmul", "mixtral-8x7b down, prefill 4k"),
    ("linear_attention", "qwen3-next sizes, batch 2, 8k"),
    ("paged_decode", "llama3-8b decode, batch 64, 4k, pages of 16"),
    ("gather_decode", "llama3-8b 4k of 32k tokens, batch 8, pages of 64"),
    ("block_sparse_prefill", "llama3-8b, 2k after 126k, 10 % of the blocks"),
    ("grouped_gate_up", "deepseek-v2-lite gate and up, prefill 4k"),
    ("paged_decode", "llama3-8b decode, batch 8, 32k, pages of 64"),
    ("flash_decode", "llama3-8b tree of 64, batch 8, 8k"),
    ("flash_decode", "gpt-oss-20b local layer, batch 32, 32k"),
    ("flash_prefill", "deepseek-v2-lite prefill, 4k"),
    ("mla_decode", "deepseek-v3 decode, batch 8, 32k"),
    ("grouped_matmul", "deepseek-v2-lite down, decode, batch 8"),
    ("grouped_gate_up", "mixtral-8x7b gate and up, decode, batch 8"),
)


def poisoned(kernel: str, operands: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The operands with NaN where the kernel's documentation lets anything be."""
    return {**operands, **_POISON[kernel](operands, options)}


def _nan_where(array: jax.Array, is_unread: Any) -> jax.Array:
    """NaN where the mask, over the array's first axes, is true."""
    mask = jnp.asarray(is_unread)
    mask = mask.reshape(*mask.shape, *(1,) * (array.ndim - mask.ndim))
    return jnp.where(mask, jnp.asarray(jnp.nan, array.dtype), array)


def _after_length(*names: str, axis: int) -> Poison:
    """Slots along an axis from the row's length on."""

    def poison(operands: Mapping[str, Any], _: Any) -> dict[str, Any]:
        num_slots = operands[names[0]].shape[axis]
        unread = np.arange(num_slots) >= np.asarray(operands["length"])[:, None]
        return {name: _nan_where(operands[name], np.expand_dims(unread, tuple(range(1, axis)))) for name in names}

    return poison


def _pages(operands: Mapping[str, Any], _: Any) -> dict[str, Any]:
    """Slots of pages from the length of the table's row on; no page is in two tables."""
    table, length, page_tokens = np.asarray(operands["table"]), operands["length"], operands["key_pages"].shape[2]
    slots = np.arange(table.shape[2] * page_tokens).reshape(table.shape[2], page_tokens)
    unread = np.ones((operands["key_pages"].shape[0], page_tokens), bool)
    unread[table.reshape(-1)] = (slots >= np.asarray(length)[..., None, None]).reshape(-1, page_tokens)
    return {name: _nan_where(operands[name], unread[:, None]) for name in ("key_pages", "value_pages")}


def _unlisted(operands: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Slots of no list, and those from the length on."""
    index, count, key = np.asarray(operands["index"]), np.asarray(operands["count"]), operands["key"]
    num_slots, block_tokens = key.shape[2], options["block_tokens"]
    listed = np.zeros((*key.shape[:2], num_slots // block_tokens), bool)
    for row, head in np.ndindex(*count.shape):
        listed[row, head, index[row, head, : count[row, head]]] = True
    attended = np.repeat(listed, block_tokens, axis=2)
    attended &= (np.arange(num_slots) < np.asarray(operands["length"])[:, None])[:, None]
    return {name: _nan_where(operands[name], ~attended) for name in ("key", "value")}


def _rows_of_nobody(operands: Mapping[str, Any], _: Any) -> dict[str, Any]:
    """Tokens after the last group, and the weights of empty groups."""
    sizes = operands["group_sizes"]
    weights = [name for name in operands if name not in ("tokens", "group_sizes")]
    tokens = _nan_where(operands["tokens"], jnp.arange(operands["tokens"].shape[0]) >= jnp.sum(sizes))
    return {"tokens": tokens, **{name: _nan_where(operands[name], sizes == 0) for name in weights}}


_POISON: dict[str, Poison] = {
    **dict.fromkeys(("flash_prefill", "flash_decode", "block_sparse_prefill"), _after_length("key", "value", axis=2)),
    "paged_decode": _pages,
    "gather_decode": _unlisted,
    "mla_decode": _after_length("latent", "rope_key", axis=1),
    **dict.fromkeys(("grouped_matmul", "grouped_gate_up"), _rows_of_nobody),
    "linear_attention": _after_length("query", "key", "value", "log_decay", axis=1),
}
assert set(CASES) == set(REPEATED) == set(_POISON) == set(KERNELS)
