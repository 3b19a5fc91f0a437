"""Measures how long a function takes on the device, and the device's limits.

The function runs many times inside one compiled program, each turn bound to the one before by its data, so that the
time to start it from Python is not measured. Small operands exist in several copies, so that a turn reads them from
memory and not from the device's cache, as a layer does among all layers.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

COLD_BYTES = 1 << 28  # several times the 50 MB of L2 of an H100 or H200 (NVIDIA H100 whitepaper)
MAX_COPIES = 16
RUN_SECONDS = 0.2  # of one timed run; starting it takes some 0.0001
MAX_TURNS = 2000
COPY_BYTES = 1 << 32
MATMUL_SIZE = 8192


def timed(function: Callable[[Any], Any], operands: Any, *, run_seconds: float = RUN_SECONDS) -> Callable[[], float]:
    """A function that runs `function` for about `run_seconds` and gives the seconds of one call; compiled already."""
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(operands))
    num_copies = int(min(MAX_COPIES, max(1, -(-COLD_BYTES // num_bytes)))) if jax.default_backend() != "cpu" else 1
    copies = [operands, *(jax.tree.map(jnp.copy, operands) for _ in range(num_copies - 1))]
    few = _compiled(function, copies, turns=2)
    seconds(few, copies)
    turns = int(min(MAX_TURNS, max(2, 2 * run_seconds / seconds(few, copies))))
    many = _compiled(function, copies, turns)
    return lambda: seconds(many, copies) / (turns * num_copies)


def seconds(program: Callable[[Any], Any], operands: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(operands))
    return time.perf_counter() - start


def _compiled(function: Callable[[Any], Any], copies: Sequence[Any], turns: int) -> Any:
    return jax.jit(lambda copies: repeated(function, copies, turns)).lower(copies).compile()


def repeated(function: Callable[[Any], Any], copies: Sequence[Any], turns: int) -> jax.Array:
    """Calls `function` on every copy of its operands, `turns` times over; gives a zero that depends on all outputs.

    A turn adds the zero of the turn before to the smallest operand, to which a barrier ties all others. So the compiler
    can start no turn early, skip none, and do none once for all.
    """

    def turn(_: Any, zero: jax.Array) -> jax.Array:
        tied = jax.lax.optimization_barrier(_with_smallest_raised(copies, zero))
        outputs = jax.lax.optimization_barrier([function(operands) for operands in tied])
        first = [jnp.isnan(leaf[(0,) * leaf.ndim]) for leaf in jax.tree.leaves(outputs) if leaf.size]
        return jnp.minimum(jnp.sum(jnp.stack(first), dtype=jnp.int32), 0)  # which the compiler cannot know

    return jax.lax.fori_loop(0, turns, turn, jnp.int32(0))


def _with_smallest_raised(copies: Sequence[Any], zero: jax.Array) -> Any:
    leaves, structure = jax.tree.flatten(list(copies))
    numbers = [index for index, leaf in enumerate(leaves) if leaf.dtype != jnp.bool_ and leaf.size]
    smallest = min(numbers, key=lambda index: leaves[index].nbytes)
    leaves[smallest] = leaves[smallest] + zero.astype(leaves[smallest].dtype)
    return jax.tree.unflatten(structure, leaves)


def copy_bytes_per_second(num_bytes: int = COPY_BYTES, *, rounds: int = 5, run_seconds: float = RUN_SECONDS) -> float:
    """Bytes read and written per second by a copy of a large array, median of the rounds."""
    operands = {"array": jnp.ones(num_bytes // 4, jnp.float32), "one": jnp.ones(1, jnp.float32)}
    run = timed(lambda operands: operands["array"] + operands["one"], operands, run_seconds=run_seconds)
    return 2 * operands["array"].nbytes / statistics.median(run() for _ in range(rounds))


def matmul_flops_per_second(size: int = MATMUL_SIZE, *, rounds: int = 5, run_seconds: float = RUN_SECONDS) -> float:
    """Floating-point operations per second of a bfloat16 matrix product of random numbers, median of the rounds."""
    seeds = jax.random.split(jax.random.key(0), 2)
    left, right = (jax.random.normal(seed, (size, size), jnp.bfloat16) for seed in seeds)

    def product(operands: dict[str, jax.Array]) -> Any:
        # The third operand, returned unchanged, ties the turns: adding to a matrix would be one more pass over it.
        return jnp.dot(operands["left"], operands["right"], precision=jax.lax.Precision.DEFAULT), operands["tie"]

    run = timed(product, {"left": left, "right": right, "tie": jnp.zeros(1, jnp.float32)}, run_seconds=run_seconds)
    return 2 * size**3 / statistics.median(run() for _ in range(rounds))
