"""Runs decode attention on TPU with one kernel body for a contiguous cache, a paged one and lists of pages.

A core processes the items (row of the batch, group of key-value heads) one after the other, each in blocks of pages
and, last, its new tokens. For each key-value head, an item's queries (T tokens x G heads) are the rows of a matrix.

    grid step (item)       0: row 0, heads 0..J-1     1: row 0, heads J..2J-1    2: row 1 ...
    its blocks of pages    [p p p][p p p][p - -] new  [p p p][p p p][p - -] new  new  [p p p] ...
    buffers in VMEM           0      1      2            3      0      1                 2       filled in turn

Blocks are copied explicitly, `NUM_BUFFERS - 1` of them ahead, also from one item into the next, so that short rows do
not wait for memory. A page that no query needs (after the length, before the window) is not copied. The caches differ
in where an item's pages are and which of their slots hold tokens: a `Pages`.

If H is no multiple of the 128 lanes, XLA keeps tokens in lanes at a program's border, [.., H, S] in memory, without
padding. A cache of full tiles of 128 tokens is read in this layout (`in_lanes`). Others of such head sizes are read as
rows of H numbers, to which XLA copies them at each call: pad the pages of such heads to 128. Inside a loop XLA may
choose another layout for what writes the cache, and copy it at every step: attend_kernels.py handles this.

The inner body is FlashAttention-2's (arXiv 2307.08691), by online_softmax.py.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from decodax.kernels_pallas.compat import tpu_interpreter
from decodax.kernels_pallas.decode.new_tokens import NewTokens
from decodax.kernels_pallas.online_softmax import LOG2E, MASKED, OnlineSoftmax, absorb, capped, finish, precision
from decodax.kernels_pallas.padding import padded
from decodax.kernels_pallas.selection import every_reason

SUBLANES, LANES = 8, 128  # a tile of memory
NUM_BUFFERS = 4
BLOCK_BYTES = 2**19  # of keys, and of values: 3 MiB in flight, for 1.6 TB/s x a latency of 2 us
MAX_BLOCK_TOKENS = 2048
MAX_BLOCK_PAGES = 32
MAX_SCORES = 2**17  # per block and head, float32
MAX_ROWS = 256  # of all heads of an item
LIST_BYTES = 2**19  # of page numbers in scalar memory
NOT_READ = 2**30  # as a slot's number: no query attends to it


class Item(NamedTuple):
    """A row of the batch and the first of the key-value heads that a grid step works on."""

    row: Any
    head: Any


@runtime_checkable
class Pages(Protocol):
    """Locates the pages of an item. Its i-th page is the i-th one that it reads, not the i-th of the cache."""

    @property
    def page_tokens(self) -> int: ...

    @property
    def most_pages(self) -> int:
        """The most pages that an item can have."""
        ...

    @property
    def are_in_order(self) -> bool:
        """Whether pages are ordered by their tokens, so that all but an item's last one are full."""
        ...

    @property
    def may_be_in_lanes(self) -> bool:
        """Whether pages, and the cache, start and end at multiples of 128 tokens."""
        ...

    def scalars(self) -> Sequence[jax.Array]:
        """int32 vectors that the kernel prefetches into scalar memory."""
        ...

    def place(self, scalars: Sequence[Any], item: Item, i: Any) -> tuple[Any, Any, Any]:
        """The i-th page: its index on the cache's first axis, its first head there, its first slot there."""
        ...

    def num_filled(self, scalars: Sequence[Any], item: Item, i: Any) -> Any:
        """Number of first slots of the i-th page that hold tokens; page_tokens or more: all, 0 or less: none."""
        ...

    def slots(self, scalars: Sequence[Any], item: Item, start: Any, block_pages: int) -> jax.Array:
        """The slot in the cache of each token of a block, its pages from `start` on, int32 [1, block's tokens].

        NOT_READ for what is not a token of the item: after the length or its last page.
        """
        ...


@dataclass(frozen=True)
class Window:
    """Pages in token order: those of the sink tokens, then from the first slot in a window to the length.

    page_tokens: tokens per page.
    length: cached tokens, [B, K or 1].
    first: first slot of each query's window, [B, T]; None: no window.
    num_sink_tokens: attended to besides the window.
    """

    page_tokens: int
    length: jax.Array
    first: jax.Array | None
    num_sink_tokens: int

    def scalars(self) -> tuple[jax.Array, jax.Array]:
        return self.length.reshape(-1).astype(jnp.int32), self._start_page()

    def num_pages(self) -> jax.Array:
        """[B, K or 1]: number of pages that an item reads."""
        end = -(-self.length // self.page_tokens)
        after_sinks = jnp.maximum(end - self._start_page()[:, None], 0)
        return jnp.minimum(self._sink_pages, end) + after_sinks

    def length_of(self, scalars: Sequence[Any], item: Item) -> Any:
        return scalars[0][item.row if self.length.shape[1] == 1 else item.row * self.length.shape[1] + item.head]

    def number_of(self, scalars: Sequence[Any], item: Item, i: Any) -> Any:
        """The page number within the row of the i-th page that an item reads."""
        return jnp.where(i < self._sink_pages, i, i - self._sink_pages + scalars[1][item.row])

    def slots(self, scalars: Sequence[Any], item: Item, start: Any, block_pages: int) -> jax.Array:
        """[1, tokens of a block]: their slots, as if the row had no last slot."""
        token = jax.lax.broadcasted_iota(jnp.int32, (1, block_pages * self.page_tokens), 1) + start * self.page_tokens
        gap = (scalars[1][item.row] - self._sink_pages) * self.page_tokens
        return jnp.where(token < self._sink_pages * self.page_tokens, token, token + gap)

    @property
    def _sink_pages(self) -> int:
        return 0 if self.first is None else -(-self.num_sink_tokens // self.page_tokens)

    def _start_page(self) -> jax.Array:
        """[B]: the first page that is read after those of the sink tokens."""
        if self.first is None:
            return jnp.zeros(self.length.shape[0], jnp.int32)
        lowest = jnp.min(self.first, axis=1).astype(jnp.int32)
        return jnp.maximum(lowest // self.page_tokens, self._sink_pages)


class _Cached(NamedTuple):
    """Keys or values.

    cache: in HBM.
    room: NUM_BUFFERS blocks of J heads in VMEM.
    in_lanes: whether both are [.., H, tokens].
    """

    cache: Any
    room: Any
    in_lanes: bool

    @property
    def tokens_axis(self) -> int:
        return 3 if self.in_lanes else 2

    def page_in(self, place: tuple[Any, Any, Any], num_heads: int, page_tokens: int) -> Any:
        """A page in the cache."""
        index, head, start = place
        return self.cache.at[(index, pl.ds(head, num_heads), *self._tokens(self.cache, start, page_tokens))]

    def page_of(self, buffer: Any, i: Any, page_tokens: int) -> Any:
        """The VMEM of the i-th page of a block."""
        start = pl.multiple_of(i * page_tokens, page_tokens)
        return self.room.at[(buffer, slice(None), *self._tokens(self.room, start, page_tokens))]

    def _tokens(self, ref: Any, start: Any, number: int) -> tuple[Any, ...]:
        """The index of these tokens; all of them need not be a multiple of anything."""
        tokens = slice(None) if number == ref.shape[self.tokens_axis] else pl.ds(start, number)
        return (slice(None), tokens) if self.in_lanes else (tokens,)


def _in_lanes(pages: Pages, head_size: int) -> bool:
    return head_size % LANES != 0 and pages.may_be_in_lanes


class _Sizes(NamedTuple):
    num_items: int
    groups: int
    heads: int  # per item
    page_tokens: int
    block_pages: int

    @property
    def block_tokens(self) -> int:
        return self.page_tokens * self.block_pages

    def item(self, number: Any) -> Item:
        row, group = divided(number, self.groups)
        return Item(row, group * self.heads)

    def per_item(self, *shape: int) -> pl.BlockSpec:
        """Blocks of [B, K, *shape]: the heads of an item."""
        return pl.BlockSpec((1, self.heads, *shape), lambda i, *_: (*divided(i, self.groups), 0, 0))

    def per_row(self, *shape: int) -> pl.BlockSpec:
        """Blocks of [B, *shape]."""
        return pl.BlockSpec((1, *shape), lambda i, *_: (divided(i, self.groups)[0], 0, 0))


class _Rows(NamedTuple):
    """The matrix rows of a key-value head's queries: query t and head g of its group are row t G + g.

    num_queries: T.
    num_kv_heads: K.
    group: query heads per key-value head, G.
    padded: number of rows with padding.
    """

    num_queries: int
    num_kv_heads: int
    group: int
    padded: int

    def packed(self, x: jax.Array) -> jax.Array:
        """[B, T, N, ...] as [B, K, rows, ...]."""
        grouped = jnp.moveaxis(x.reshape(*x.shape[:2], self.num_kv_heads, self.group, *x.shape[3:]), 2, 1)
        return padded(grouped.reshape(*grouped.shape[:2], -1, *x.shape[3:]), 2, self.padded)

    def unpacked(self, x: jax.Array) -> jax.Array:
        """The inverse of `packed`."""
        x = x[:, :, : self.num_queries * self.group]
        x = x.reshape(x.shape[0], self.num_kv_heads, self.num_queries, self.group, -1)
        return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], self.num_queries, self.num_kv_heads * self.group, -1)

    def per_query(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] as [B, rows, ...]."""
        return padded(jnp.repeat(x, self.group, axis=1), 1, self.padded)


def decode(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    new: NewTokens | None,
    pages: Pages,
    num_pages: jax.Array,
    *,
    num_kv_heads: int,
    scale: float,
    softcap: float | None,
    first: jax.Array | None,
    num_sink_tokens: int,
    sink_logits: jax.Array | None,
    interpret: bool,
    name: str,
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, I] and the log-sum-exp [B, T, N] of queries.

    query: [B, T, N, H].
    key, value: in which `pages` locates pages.
    new: tokens that are not in the cache.
    pages: of the cache.
    num_pages: [B, K or 1], of each head; heads that read the same pages are processed together, as many as fit.
    num_kv_heads: K.
    scale, softcap, first, num_sink_tokens, sink_logits: as for `flash_decode`.
    interpret: run on CPU.
    name: of the kernel.
    """
    batch, num_queries, num_heads, head_size = query.shape
    value_size, group = value.shape[-1], num_heads // num_kv_heads
    rows = _Rows(num_queries, num_kv_heads, group, _round_up(num_queries * group, _row_tile(query.dtype)))
    in_lanes = _in_lanes(pages, head_size), _in_lanes(pages, value_size)
    token_bytes = key.dtype.itemsize * (head_size if in_lanes[0] else _round_up(head_size, LANES))
    sizes = _sizes(pages, token_bytes, num_kv_heads, num_pages, rows.padded)
    operands = _in_vmem(rows, sizes, query, new, first, sink_logits)
    caches = [x.swapaxes(2, 3) if transposed else x for x, transposed in zip((key, value), in_lanes, strict=True)]
    for operand, cache in zip(("key", "value"), caches, strict=True):
        operands[operand] = (cache, pl.BlockSpec(memory_space=pltpu.HBM))

    counts = jnp.broadcast_to(num_pages, (batch, sizes.groups)).reshape(-1).astype(jnp.int32)
    scalars = (counts, _next_item(counts), *pages.scalars())
    body = functools.partial(
        _body,
        pages,
        sizes,
        tuple(operands),
        len(scalars),
        in_lanes,
        scale=scale,
        softcap=softcap,
        num_sink_tokens=num_sink_tokens,
    )

    def room(cache: jax.Array, transposed: bool) -> Any:
        block = (sizes.block_tokens, cache.shape[3])
        return pltpu.VMEM((NUM_BUFFERS, sizes.heads, *(block[::-1] if transposed else block)), cache.dtype)

    outputs = (
        jax.ShapeDtypeStruct((batch, num_kv_heads, rows.padded, value_size), query.dtype),
        jax.ShapeDtypeStruct((batch, num_kv_heads, rows.padded, 1), jnp.float32),
    )
    output, log_sum_exp = pl.pallas_call(
        body,
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(sizes.num_items,),
            in_specs=[spec for _, spec in operands.values()],
            out_specs=[sizes.per_item(rows.padded, value_size), sizes.per_item(rows.padded, 1)],
            scratch_shapes=[
                room(key, in_lanes[0]),
                room(value, in_lanes[1]),
                pltpu.SemaphoreType.DMA((2, NUM_BUFFERS)),
                pltpu.SMEM((4,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=max(16, rows.padded // 128) * 2**20
        ),
        interpret=tpu_interpreter(interpret),
        name=name,
    )(*scalars, *(operand for operand, _ in operands.values()))

    return rows.unpacked(output), rows.unpacked(log_sum_exp)[..., 0]


def _in_vmem(
    rows: _Rows,
    sizes: _Sizes,
    query: jax.Array,
    new: NewTokens | None,
    first: jax.Array | None,
    sink_logits: jax.Array | None,
) -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
    """The operands that come in blocks of one item, with their block specs."""
    operands = {"query": (rows.packed(query), sizes.per_item(rows.padded, query.shape[3]))}
    if new is not None:
        num_new = _round_up(new.key.shape[2], _row_tile(query.dtype))
        is_read = jnp.any(new.allowed, axis=1)[:, None, :, None]
        allowed = padded(rows.per_query(new.allowed.astype(jnp.float32)), 2, num_new)
        for name, x in (("new_key", new.key), ("new_value", jnp.where(is_read, new.value, 0))):
            operands[name] = (padded(x, 2, num_new), sizes.per_item(num_new, x.shape[3]))
        operands["allowed"] = (allowed, sizes.per_row(rows.padded, num_new))
    if first is not None:
        operands["first"] = (rows.per_query(first)[..., None], sizes.per_row(rows.padded, 1))
    if sink_logits is not None:
        logits = jnp.broadcast_to(sink_logits.astype(jnp.float32), (1, *query.shape[1:3]))
        spec = pl.BlockSpec((1, sizes.heads, rows.padded, 1), lambda i, *_: (0, divided(i, sizes.groups)[1], 0, 0))
        operands["sink"] = (rows.packed(logits)[..., None], spec)
    return operands


def _sizes(pages: Pages, token_bytes: int, num_kv_heads: int, num_pages: jax.Array, rows: int) -> _Sizes:
    """Chooses heads per item and pages per block, so that a block has about BLOCK_BYTES and its scores stay small."""
    page_tokens, batch, heads = pages.page_tokens, num_pages.shape[0], 1
    if num_pages.shape[1] == 1:
        fits = min(8, MAX_ROWS // rows, BLOCK_BYTES // (token_bytes * max(page_tokens, 128)))
        heads = max(h for h in range(1, num_kv_heads + 1) if num_kv_heads % h == 0 and h <= max(1, fits))
    tokens = min(MAX_BLOCK_TOKENS, MAX_SCORES // rows, BLOCK_BYTES // (token_bytes * heads))
    block_pages = max(1, min(tokens // page_tokens, MAX_BLOCK_PAGES, pages.most_pages))
    groups = num_kv_heads // heads
    return _Sizes(batch * groups, groups, heads, page_tokens, block_pages)


def divided(number: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder of a non-negative number (`//` depends on the chip that it is traced for)."""
    return jax.lax.div(number, jnp.int32(by)), jax.lax.rem(number, jnp.int32(by))


def _next_item(counts: jax.Array) -> jax.Array:
    """For i in 0 .. items: the first item from i on that has pages, else the number of items."""
    number = jnp.arange(counts.size, dtype=jnp.int32)
    own = jnp.append(jnp.where(counts > 0, number, counts.size), jnp.int32(counts.size))
    return jax.lax.cummin(own, reverse=True)


def _row_tile(dtype: Any) -> int:
    """Rows of a matrix in a tile of VMEM."""
    return 8 if dtype == jnp.float32 else 16


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _body(
    pages: Pages,
    sizes: _Sizes,
    names: tuple[str, ...],
    num_scalars: int,
    in_lanes: tuple[bool, bool],
    *refs: Any,
    scale: float,
    softcap: float | None,
    num_sink_tokens: int,
) -> None:
    """Processes one item. The prefetch runs ahead of it; `state` is what both share."""
    counts, next_item, *scalars = refs[:num_scalars]
    operands = dict(zip(names, refs[num_scalars:], strict=False))
    output_ref, log_sum_exp_ref, *rooms, semaphores, state = refs[num_scalars + len(names) :]
    keys, values = map(_Cached, (operands["key"], operands["value"]), rooms, in_lanes)
    number = pl.program_id(0)
    item = sizes.item(number)
    block_pages, page_tokens = sizes.block_pages, sizes.page_tokens
    ITEM, START, FETCHED, USED = range(4)  # state: the prefetch's item and page, blocks fetched and blocks used so far

    def each_page(of: Any, start: Any, buffer: Any, act: Any) -> None:
        """Starts or awaits the copies of a block of an item, its pages from `start` on."""

        def step(i: Any, _: Any) -> None:
            place = pages.place(scalars, sizes.item(of), start + i)
            for index, cached in enumerate((keys, values)):
                source = cached.page_in(place, sizes.heads, page_tokens)
                target = cached.page_of(buffer, i, page_tokens)
                act(pltpu.make_async_copy(source, target, semaphores.at[index, buffer]))

        jax.lax.fori_loop(0, jnp.minimum(block_pages, counts[of] - start), step, None)

    def fetch_next() -> None:
        of, start = state[ITEM], state[START]

        @pl.when(of < sizes.num_items)
        def _() -> None:
            each_page(of, start, divided(state[FETCHED], NUM_BUFFERS)[1], lambda copy: copy.start())
            is_last = start + block_pages >= counts[of]
            state[ITEM] = jnp.where(is_last, next_item[of + 1], of)
            state[START] = jnp.where(is_last, 0, start + block_pages)
            state[FETCHED] += 1

    @pl.when(number == 0)
    def _() -> None:
        state[ITEM], state[START], state[FETCHED], state[USED] = next_item[0], 0, 0, 0
        jax.lax.fori_loop(0, NUM_BUFFERS - 1, lambda _, __: fetch_next(), None)

    def scrub(start: Any, buffer: Any) -> None:
        """Zeros values where a page holds no token: they may be anything, and 0 x NaN is NaN."""

        def step(i: Any, _: Any) -> None:
            filled = jnp.where(start + i < counts[number], pages.num_filled(scalars, item, start + i), 0)

            @pl.when(filled < page_tokens)
            def _() -> None:
                page = values.page_of(buffer, i, page_tokens)
                token = jax.lax.broadcasted_iota(jnp.int32, page.shape, values.tokens_axis - 1)
                page[...] = jnp.where(token < filled, page[...], jnp.zeros(page.shape, page.dtype))

        jax.lax.fori_loop(0, block_pages, step, None)

    def scores(query: jax.Array, key: jax.Array, is_read: jax.Array, head_axis: int = 1) -> jax.Array:
        product = jax.lax.dot_general(
            query,
            key,
            (((1,), (head_axis,)), ((), ())),
            precision=precision(key.dtype),
            preferred_element_type=jnp.float32,
        )
        return jnp.where(is_read, capped(product, scale, softcap), MASKED)

    rows = output_ref.shape[2]
    queries = [operands["query"][0, h] for h in range(sizes.heads)]

    def use(block: Any, seen: tuple[OnlineSoftmax, ...]) -> tuple[OnlineSoftmax, ...]:
        fetch_next()
        start, buffer = block * block_pages, divided(state[USED], NUM_BUFFERS)[1]
        state[USED] += 1
        each_page(number, start, buffer, lambda copy: copy.wait())
        if pages.are_in_order:
            pl.when(start + block_pages >= counts[number])(lambda: scrub(start, buffer))
        else:
            scrub(start, buffer)
        slot = jnp.broadcast_to(pages.slots(scalars, item, start, block_pages), (rows, sizes.block_tokens))
        is_read = slot < NOT_READ
        if "first" in operands:
            first = jnp.broadcast_to(operands["first"][0], slot.shape)
            is_read &= (slot >= first) | (slot < num_sink_tokens)

        def absorbed(h: int) -> OnlineSoftmax:
            # Quantised caches would be scaled here.
            score = scores(queries[h], keys.room[buffer, h], is_read, head_axis=0 if keys.in_lanes else 1)
            value = values.room[buffer, h]
            return absorb(seen[h], score, value.T if values.in_lanes else value)

        return tuple(absorbed(h) for h in range(sizes.heads))

    num_blocks = divided(counts[number] + block_pages - 1, block_pages)[0]
    before = tuple(_start(operands.get("sink"), h, rows, output_ref.shape[3]) for h in range(sizes.heads))
    seen = jax.lax.fori_loop(0, num_blocks, use, before)
    if "new_key" in operands:
        allowed = operands["allowed"][0] > 0
        seen = tuple(
            absorb(seen[h], scores(queries[h], operands["new_key"][0, h], allowed), operands["new_value"][0, h])
            for h in range(sizes.heads)
        )
    for h in range(sizes.heads):
        output, log_sum_exp = finish(seen[h])
        output_ref[0, h] = output.astype(output_ref.dtype)
        log_sum_exp_ref[0, h] = log_sum_exp


def _start(sink: Any, h: int, rows: int, value_size: int) -> OnlineSoftmax:
    """The state before any key; a learned sink is one weight of 1 for the value 0."""
    zero = jnp.zeros((rows, 1), jnp.float32)
    output = jnp.zeros((rows, value_size), jnp.float32)
    if sink is None:
        return OnlineSoftmax(zero + MASKED, zero, output)
    return OnlineSoftmax(jnp.maximum(sink[0, h] * LOG2E, MASKED), zero + 1.0, output)


def by_rows(
    lists: jax.Array, some_rows: Callable[..., tuple[jax.Array, jax.Array]], *operands: Any
) -> tuple[jax.Array, jax.Array]:
    """Calls `some_rows(number of the first row, *operands of these rows)`, for as many rows at once as fit.

    lists: [B, K or 1, M], the page numbers, which the kernel keeps in scalar memory.
    """
    batch, row_bytes = lists.shape[0], 4 * max(1, lists[0].size)
    num_rows = max(1, LIST_BYTES // row_bytes)
    if batch <= num_rows:
        return some_rows(0, *operands)
    results = []
    for start in range(0, batch, num_rows):
        rows = slice(start, start + num_rows)
        results.append(some_rows(start, *jax.tree.map(lambda x, rows=rows: x[rows], operands)))
    outputs, log_sum_exps = zip(*results, strict=True)
    return jnp.concatenate(outputs), jnp.concatenate(log_sum_exps)


def unsupported_lists(lists: Any) -> str | None:
    """Why the page lists [B, K or 1, M] of one row do not fit into scalar memory; None if they do."""
    row_bytes = 4 * lists.shape[1] * lists.shape[2]
    if row_bytes > LIST_BYTES:
        return f"on TPU the page numbers of one row must fit into {LIST_BYTES} bytes, got {row_bytes}"
    return None


@every_reason
def unsupported_operands(
    query: Any, key: Any, value: Any, new: NewTokens | None, page_tokens: int
) -> Iterator[str | None]:
    """Every reason why the kernel does not support these queries, caches and new tokens.

    query, key, value, new: operands.
    page_tokens: of which the first slots of pages are multiples; 0 if the cache is one page.
    """
    dtypes = {x.dtype for x in (query, key, value, *(() if new is None else (new.key, new.value)))}
    if len(dtypes) > 1 or query.dtype not in (jnp.float32, jnp.bfloat16):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        yield f"on TPU all operands must be float32 or all bfloat16, got {names}"
    if page_tokens % SUBLANES:
        yield f"on TPU a cache is read in multiples of {SUBLANES} slots, got {page_tokens}"
