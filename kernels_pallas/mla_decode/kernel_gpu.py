"""Computes MLA decode attention on Hopper GPUs: two warpgroups share each tile of latents, and each owns half of R.

The M = T N queries of a row are the rows of one matrix, in groups of 64 (the rows of a wgmma). Their 64 x R sums in
float32 are too many for the registers of one warpgroup (256 a thread at R = 512), so a program has two of them. Both
compute all scores (1.5 times the least work at R = 512, but they need not exchange anything, and one can multiply while
the other takes exponentials), and each adds its half of the columns to its sums:

    tile of 64 tokens     columns 0 .. R/2 | columns R/2 .. R | rope keys
    scores                both             | both             | both
    output                warpgroup 0      | warpgroup 1      |
    copies the next       warpgroup 0      | warpgroup 1      | half of the tokens each

A tile is copied into shared memory once for both products; two tiles and the queries fill it. When a warpgroup has
added its columns, and the other has computed its scores, it starts to copy the same columns of the tile after next, so
copies and products overlap without a warpgroup that only copies.

    grid (runs, groups of 64 queries): equal runs of tiles over all rows of the batch, whatever their lengths
    (LeanAttention, arXiv 2405.10480, see partition.py); the groups of a run read the same tiles at about the same time,
    all but one of them from L2

A run's result for a row is a partial softmax: a normalised output and a log-sum-exp, float32. A second kernel, grid
(B, M), merges the partial softmaxes of each query. New tokens are the first tiles of their row.

What bounds it, at R = 512, H = 64 and bfloat16 on H200 (989 TFLOP/s, 4.8 TB/s, NVIDIA H200 data sheet; 132 cores): a
tile takes a core 2.0 us to read at its share of the bandwidth, and about 1.9 us to multiply with 64 queries (3,300
cycles at 1.75 GHz). So up to 64 queries, padded ones included, the bandwidth bounds it; at 128 the matrix unit does, at
about half of the bandwidth (making each score once would lift that to 0.8).
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.compat import Warpgroup, aligned_rows, gpu_kernel, tiled
from decodax.kernels_pallas.decode.partition import Partition, num_slots, partition
from decodax.kernels_pallas.hopper import num_cores
from decodax.kernels_pallas.mla_decode.new_latents import NewLatents, mask_nonfinite, packed
from decodax.kernels_pallas.online_softmax import (
    LOG2E,
    MASKED,
    OnlineSoftmax,
    absorb_gpu,
    capped,
    empty_softmax_gpu,
    finish_gpu,
)
from decodax.kernels_pallas.padding import WORD_BITS, bit_words, padded
from decodax.kernels_pallas.selection import every_reason

TILE_TOKENS = 64
TILE_ROWS = 64
NUM_STAGES = 2
MOST_NUMBERS = 576  # two tiles of tokens and the queries fill the 227 KiB of shared memory that a program may have
PARTIALS_AT_ONCE = 8
INTERPRETED_RUNS = 3
# Or 2, as on a GPU; up to JAX 0.10 the interpreter then compiles the body for every program separately.
INTERPRETED_THREADS = 1
_WARPGROUPS = 2
_PIECE_TOKENS = TILE_TOKENS // _WARPGROUPS
_ROW = plgpu.Layout.WGMMA.reduce(1)


@every_reason
def unsupported_reason(
    query_latent: Any, query_rope: Any, latent: Any, rope_key: Any, new: NewLatents | None, *, interpret: bool
) -> Iterator[str | None]:
    """Every reason why this kernel does not support these operands (arrays or shapes)."""
    del rope_key, new
    capacity, rank = latent.shape[1:]
    rope_size = query_rope.shape[3]
    num_groups = pl.cdiv(query_latent.shape[1] * query_latent.shape[2], TILE_ROWS)
    dtypes = ("bfloat16", "float16", "float32") if interpret else ("bfloat16", "float16")
    if rank % 128 or rank > 512:
        yield f"latents must have 128, 256, 384 or 512 numbers (R) on GPU, got {rank}"
    if rope_size % 16 or rope_size > 128:
        yield f"rope keys must have 16, 32, ... 128 numbers (H) on GPU, got {rope_size}"
    if rank + rope_size > MOST_NUMBERS:
        yield f"a token must have at most {MOST_NUMBERS} numbers (R + H) on GPU, got {rank + rope_size}"
    if capacity < TILE_TOKENS or capacity % 8:
        yield f"the cache's capacity (S) must be a multiple of 8 and at least {TILE_TOKENS} on GPU, got {capacity}"
    if num_groups > num_cores():
        yield f"queries x heads must be at most {num_cores() * TILE_ROWS} on GPU, got {num_groups * TILE_ROWS}"
    if str(latent.dtype) not in dtypes:
        yield f"the GPU kernel takes {' and '.join(dtypes)}, got {latent.dtype}"


def mla_decode(
    query_latent: Float[Array, "B T N R"],
    query_rope: Float[Array, "B T N H"],
    latent: Float[Array, "B S R"],
    rope_key: Float[Array, "B S H"],
    length: Int[Array, " B"],
    new: NewLatents | None,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
    num_runs: int | None = None,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """As the public function (see `__init__.py`), for operands without an `unsupported_reason`.

    num_runs: programs per group of 64 queries; the result depends on it only in the order of sums.
    """
    batch, num_queries, num_heads, rank = query_latent.shape
    num_rows = num_queries * num_heads
    num_groups = pl.cdiv(num_rows, TILE_ROWS)
    padded_rows = num_groups * TILE_ROWS
    queries = [padded(packed(query), 1, padded_rows) for query in (query_latent, query_rope)]
    new_operands = () if new is None else _new_operands(mask_nonfinite(new), num_heads, padded_rows)
    num_new_tiles = new_operands[0].shape[1] // TILE_TOKENS if new_operands else 0
    if num_runs is None:
        num_runs = INTERPRETED_RUNS if interpret else num_cores() // num_groups
    split = partition((length + TILE_TOKENS - 1) // TILE_TOKENS + num_new_tiles, num_runs)
    walk = _Walk(
        Warpgroup(interpret),
        functools.partial(capped, scale=scale, softcap=softcap),
        num_new_tiles,
        num_groups,
        num_runs,
    )
    partials = walk(split, length, queries, latent, rope_key, new_operands)
    output, lse = _merge(partials, split, (batch, num_rows, rank), query_latent.dtype, interpret)
    return output.reshape(query_latent.shape), lse.reshape(batch, num_queries, num_heads)


def _new_operands(new: NewLatents, num_heads: int, padded_rows: int) -> tuple[Array, Array, Array]:
    """Latents and rope keys in full tiles, and the mask: a bit per token, a word per 32, [B, words, M]."""
    num_new = new.allowed.shape[2]
    num_tokens = pl.cdiv(num_new, TILE_TOKENS) * TILE_TOKENS
    words = jnp.repeat(bit_words(new.allowed, num_tokens // WORD_BITS), num_heads, axis=1)
    words = padded(jnp.swapaxes(words, 1, 2), 2, padded_rows)
    return padded(new.latent, 1, num_tokens), padded(new.rope_key, 1, num_tokens), words


class _Memory(NamedTuple):
    """The global and shared memory of the first kernel."""

    start: Any
    first_owner: Any
    offset: Any
    length: Any
    query_latent: Any
    query_rope: Any
    latent: Any
    rope_key: Any
    new_latent: Any
    new_rope_key: Any
    new_words: Any
    output: Any
    lse: Any
    query_latent_shared: Any  # [2, 64, R / 2]: by halves of the columns
    query_rope_shared: Any
    latents: Any  # [stages, 2, 64, R / 2]: by halves of the columns
    rope_keys: Any  # [stages, 64, H]
    words: Any
    queries_arrived: Any
    tile_arrived: Any
    scores_made: Any
    interpreted_scores: Any = None  # [2, 64, 64]


class _Place(NamedTuple):
    """The indices of a tile.

    owner: its row of the batch.
    in_owner: its number there.
    stage: its buffer in shared memory.
    first: its first token in the cache.
    unread, length: its tokens from `unread` to `length - 1` are attended to.
    """

    owner: Array
    in_owner: Array
    stage: Array
    first: Array
    unread: Array
    length: Array


@dataclass(frozen=True)
class _Walk:
    """The first kernel; an owner of tiles is a row of the batch."""

    warpgroup: Warpgroup
    score_of: Callable[[Array], Array]
    num_new_tiles: int
    num_groups: int
    num_runs: int

    def __call__(
        self,
        split: Partition,
        length: Array,
        queries: list[Array],
        latent: Array,
        rope_key: Array,
        new_operands: tuple[Array, ...],
    ) -> tuple[Array, Array]:
        """The partial softmaxes: outputs [slots, M, R] and log-sum-exps [slots, M]."""
        batch, capacity, rank = latent.shape
        rope_size, dtype = rope_key.shape[2], latent.dtype
        slots, half = num_slots(batch, self.num_runs), rank // 2

        def mla_decode(*refs: Any) -> None:
            # refs: operands, outputs, shared memory
            given = 8 + len(new_operands)
            nothing = () if new_operands else (None, None, None)
            self._run(_Memory(*refs[:given], *nothing, *refs[given:]), capacity)

        shared = [
            plgpu.SMEM((2, TILE_ROWS, half), dtype, transforms=tiled(half, dtype)),
            plgpu.SMEM((TILE_ROWS, rope_size), dtype, transforms=tiled(rope_size, dtype)),
            plgpu.SMEM((NUM_STAGES, 2, TILE_TOKENS, half), dtype, transforms=tiled(half, dtype)),
            plgpu.SMEM((NUM_STAGES, TILE_TOKENS, rope_size), dtype, transforms=tiled(rope_size, dtype)),
            plgpu.SMEM((2 * max(self.num_new_tiles, 1), TILE_ROWS), jnp.int32),
            plgpu.Barrier(num_arrivals=4 if self.num_new_tiles else 3),
            plgpu.Barrier(num_arrivals=2 * _WARPGROUPS, num_barriers=NUM_STAGES),
            plgpu.Barrier(num_arrivals=_WARPGROUPS),
        ]
        if self.warpgroup.interpret:
            shared.append(plgpu.SMEM((_WARPGROUPS, TILE_ROWS, TILE_TOKENS), jnp.float32))
        padded_rows = self.num_groups * TILE_ROWS
        kernel = gpu_kernel(
            mla_decode,
            (
                jax.ShapeDtypeStruct((slots, padded_rows, rank), jnp.float32),
                jax.ShapeDtypeStruct((slots, padded_rows), jnp.float32),
            ),
            grid=(self.num_runs, self.num_groups),
            grid_names=("run", "group"),
            num_threads=self.num_threads if self.num_threads > 1 else None,
            thread_name="half" if self.num_threads > 1 else None,
            scratch_types=shared,
            interpret=self.warpgroup.interpret,
        )
        return kernel(split.start, split.first_owner, split.offset, length, *queries, latent, rope_key, *new_operands)

    @property
    def num_threads(self) -> int:
        return INTERPRETED_THREADS if self.warpgroup.interpret else _WARPGROUPS

    def _halves(self) -> list[Any]:
        """The halves of the columns that this thread works on: a warpgroup's own, or both in turn."""
        return [0, 1] if self.num_threads == 1 else [jax.lax.axis_index("half")]

    def _run(self, memory: _Memory, capacity: int) -> None:
        run, halves = jax.lax.axis_index("run"), self._halves()
        rows = pl.ds(jax.lax.axis_index("group") * TILE_ROWS, TILE_ROWS)
        start, end = memory.start[run], memory.start[run + 1]

        def owner_of(owner: Array, tile: Array) -> Array:
            """The owner of a tile that is not before the one that `owner` owns."""
            return jax.lax.while_loop(lambda owner: memory.offset[owner + 1] <= tile, lambda owner: owner + 1, owner)

        def place_of(tile: Array, owner: Array) -> _Place:
            in_owner = tile - memory.offset[owner]
            # The last tile may not fit: it starts earlier, and masks what the tile before it has read.
            nominal = (in_owner - self.num_new_tiles) * TILE_TOKENS
            first = jnp.minimum(nominal, capacity - TILE_TOKENS)
            stage = jax.lax.rem(tile - start, jnp.int32(NUM_STAGES))
            return _Place(owner, in_owner, stage, first, nominal - first, memory.length[owner] - first)

        def fetch(owner: Array, tile: Array) -> Array:
            owner = owner_of(owner, jnp.minimum(tile, end - 1))

            @pl.when(tile < end)
            def _() -> None:
                for half in halves:
                    self._fetch(memory, place_of(tile, owner), half)

            return owner

        def of_owner(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            tile, owner, ahead = carry
            owner = owner_of(owner, tile)
            for half in halves:
                self._fetch_queries(memory, owner, rows, half)

            def step(tile: Array, carry: tuple[Array, list[OnlineSoftmax]]) -> tuple[Array, list[OnlineSoftmax]]:
                ahead, seen = carry
                place = place_of(tile, owner)
                plgpu.barrier_wait(memory.tile_arrived.at[place.stage])
                scores = [self._scores(memory, place, half) for half in halves]
                for _ in halves:
                    plgpu.barrier_arrive(memory.scores_made)
                seen = [self._absorb(memory, place, *one) for one in zip(halves, seen, scores, strict=True)]
                plgpu.barrier_wait(memory.scores_made)
                return fetch(ahead, tile + NUM_STAGES), seen

            until = jnp.minimum(end, memory.offset[owner + 1])
            nothing = empty_softmax_gpu(self.warpgroup, TILE_ROWS, memory.latents.shape[3])
            plgpu.barrier_wait(memory.queries_arrived)
            ahead, seen = jax.lax.fori_loop(tile, until, step, (ahead, [nothing for _ in halves]))
            for half, one in zip(halves, seen, strict=True):
                self._write(memory, owner + run, rows, half, one)
            return until, owner, ahead

        @pl.when(start < end)
        def _() -> None:
            first = memory.first_owner[run]
            ahead = first
            for stage in range(NUM_STAGES):
                ahead = fetch(ahead, start + stage)
            jax.lax.while_loop(lambda carry: carry[0] < end, of_owner, (start, first, ahead))

    def _fetch_queries(self, memory: _Memory, owner: Array, rows: Any, half: Any) -> None:
        columns = memory.query_latent_shared.shape[2]

        def copy(source: Any, target: Any) -> None:
            plgpu.copy_gmem_to_smem(source, target, memory.queries_arrived)

        source = memory.query_latent.at[owner, rows, pl.ds(half * columns, columns)]
        copy(source, memory.query_latent_shared.at[half])

        @pl.when(half == 0)
        def _() -> None:
            copy(memory.query_rope.at[owner, rows], memory.query_rope_shared)
            if self.num_new_tiles:
                copy(memory.new_words.at[owner, :, rows], memory.words)

    def _fetch(self, memory: _Memory, place: _Place, half: Any) -> None:
        """Starts to copy one warpgroup's columns of a tile, and the rope keys of its tokens."""
        columns = memory.latents.shape[3]

        def copies(latent: Any, rope_key: Any, first: Array) -> None:
            arrived = memory.tile_arrived.at[place.stage]
            source = latent.at[place.owner, aligned_rows(first, TILE_TOKENS), pl.ds(half * columns, columns)]
            plgpu.copy_gmem_to_smem(source, memory.latents.at[place.stage, half], arrived)
            tokens = half * _PIECE_TOKENS
            source = rope_key.at[place.owner, aligned_rows(first + tokens, _PIECE_TOKENS)]
            target = memory.rope_keys.at[place.stage, pl.ds(tokens, _PIECE_TOKENS)]
            plgpu.copy_gmem_to_smem(source, target, arrived)

        is_new = place.in_owner < self.num_new_tiles
        if self.num_new_tiles:
            pl.when(is_new)(lambda: copies(memory.new_latent, memory.new_rope_key, place.in_owner * TILE_TOKENS))
        pl.when(jnp.logical_not(is_new))(lambda: copies(memory.latent, memory.rope_key, place.first))

    def _scores(self, memory: _Memory, place: _Place, half: Any) -> Array:
        """Scores of a tile's tokens, [64, 64]; scales of quantised latents would be multiplied in here."""
        warpgroup = self.warpgroup
        pairs = [(memory.query_rope_shared, memory.rope_keys.at[place.stage])]
        pairs += [(memory.query_latent_shared.at[i], memory.latents.at[place.stage, i]) for i in range(2)]

        def add(accumulator: Any) -> None:
            for query, key in pairs:
                warpgroup.accumulate(accumulator, query, key, transpose_right=True)

        interpreted = memory.interpreted_scores.at[half] if warpgroup.interpret else None
        score = warpgroup.sum_of_products(add, (TILE_ROWS, TILE_TOKENS), interpreted)
        return self._masked(memory, place, self.score_of(score))

    def _masked(self, memory: _Memory, place: _Place, score: Array) -> Array:
        def of_cached(score: Array) -> Array:
            token = self.warpgroup.iota(score.shape, 1)
            return jnp.where((token >= place.unread) & (token < place.length), score, MASKED)

        def of_new(score: Array) -> Array:
            token = self.warpgroup.iota(score.shape, 1)
            words = [self.warpgroup.load(memory.words.at[2 * place.in_owner + i], _ROW) for i in range(2)]
            word = jnp.where(token < 32, *(self.warpgroup.rows(word, score.shape) for word in words))
            bit = jax.lax.shift_right_logical(word, jnp.bitwise_and(token, 31))
            return jnp.where(jnp.bitwise_and(bit, 1) != 0, score, MASKED)

        if not self.num_new_tiles:
            return of_cached(score)
        return jax.lax.cond(place.in_owner < self.num_new_tiles, of_new, of_cached, score)

    def _absorb(self, memory: _Memory, place: _Place, half: Any, seen: OnlineSoftmax, score: Array) -> OnlineSoftmax:
        is_ragged = (place.in_owner >= self.num_new_tiles) & (place.length < TILE_TOKENS)
        pl.when(is_ragged)(lambda: self._clear_unread_values(memory, place, half))
        latents = memory.latents.at[place.stage, half]
        return absorb_gpu(self.warpgroup, seen, score, latents, latents.dtype)

    def _clear_unread_values(self, memory: _Memory, place: _Place, half: Any) -> None:
        """Zeros tokens after a row's length: unwritten slots may be NaN, and 0 x NaN is NaN.

        In this warpgroup's columns; if the other still computes scores with them, it masks the scores of these tokens.
        """
        columns = memory.latents.shape[3]
        width = min(64, columns)
        for column in range(0, columns, width):
            piece = memory.latents.at[place.stage, half, :, pl.ds(column, width)]
            value = self.warpgroup.load(piece)
            is_read = self.warpgroup.iota(value.shape, 0) < place.length
            piece[...] = jnp.where(is_read, value, jnp.zeros_like(value))
        plgpu.commit_smem()

    def _write(self, memory: _Memory, slot: Array, rows: Any, half: Any, seen: OnlineSoftmax) -> None:
        """Writes a partial softmax: this warpgroup's columns of the output; the first one also the log-sum-exp."""
        output, lse = finish_gpu(self.warpgroup, seen)
        columns = output.shape[1]
        memory.output[slot, rows, pl.ds(half * columns, columns)] = output
        pl.when(half == 0)(functools.partial(_store, memory.lse.at[slot, rows], lse))


def _store(ref: Any, value: Array) -> None:
    ref[...] = value


def _merge(
    partials: tuple[Array, Array], split: Partition, shape: tuple[int, int, int], dtype: Any, interpret: bool
) -> tuple[Array, Array]:
    """Merges the partial softmaxes (second kernel): output [B, M, R] and log-sum-exp [B, M] of each query.

    partials: outputs and log-sum-exps of all slots.
    split: the runs.
    shape: (B, M, R).
    dtype: of the output.
    interpret: run on CPU.
    """
    batch, num_rows, rank = shape
    warpgroup, layout = Warpgroup(interpret), plgpu.Layout.WG_STRIDED((rank,), rank // 128)

    def mla_decode_merge(
        output: Any, lse: Any, first_partial: Any, num_partials: Any, merged: Any, merged_lse: Any
    ) -> None:
        owner, row = jax.lax.axis_index("row"), jax.lax.axis_index("query")
        first, end = first_partial[owner], first_partial[owner] + num_partials[owner]

        def group(i: Array, seen: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, mixed = seen
            slots = [first + i * PARTIALS_AT_ONCE + j for j in range(PARTIALS_AT_ONCE)]
            values = [
                warpgroup.load(output.at[jnp.minimum(slot, end - 1), row], layout, is_shared=False) for slot in slots
            ]
            scores = [
                jnp.where(slot < end, jnp.maximum(lse[jnp.minimum(slot, end - 1), row] * LOG2E, MASKED), MASKED)
                for slot in slots
            ]
            highest = functools.reduce(jnp.maximum, scores, maximum)
            decay = jnp.exp2(maximum - highest)
            total, mixed = total * decay, mixed * decay
            for score, value in zip(scores, values, strict=True):
                weight = jnp.where(score <= MASKED, 0.0, jnp.exp2(score - highest))  # NaN stays NaN
                total, mixed = total + weight, mixed + value * weight
            return highest, total, mixed

        nothing = (jnp.float32(MASKED), jnp.float32(0.0), warpgroup.full((rank,), 0.0, layout))
        maximum, total, mixed = jax.lax.fori_loop(0, pl.cdiv(end - first, PARTIALS_AT_ONCE), group, nothing)
        is_empty = total == 0.0
        merged[owner, row] = (mixed * jnp.where(is_empty, 0.0, 1.0 / jnp.where(is_empty, 1.0, total))).astype(dtype)
        safe = jnp.where(is_empty, 1.0, total)
        merged_lse[owner, row] = jnp.where(is_empty, -jnp.inf, (maximum + jnp.log(safe) * LOG2E) * (1 / LOG2E))

    kernel = gpu_kernel(
        mla_decode_merge,
        (
            jax.ShapeDtypeStruct((batch, num_rows, rank), dtype),
            jax.ShapeDtypeStruct((batch, num_rows), jnp.float32),
        ),
        grid=(batch, num_rows),
        grid_names=("row", "query"),
        scratch_types=[],
        interpret=interpret,
    )
    return kernel(*partials, split.first_partial, split.num_partials)
