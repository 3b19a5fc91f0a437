"""Defines the sizes of the kernels' benchmark: named real ones, sweeps around them, and tiny ones that run anywhere."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from decodax.kernels_pallas import module_of, shapes_of
from decodax.kernels_pallas.flash_decode.shapes import Shape as DecodeShape
from decodax.kernels_pallas.flash_prefill.shapes import Shape as PrefillShape


@dataclasses.dataclass(frozen=True)
class Target:
    """What a figure should reach.

    of: the copy bandwidth ("bytes") or the matmul rate ("flops").
    at_least: the share of it.
    """

    of: str
    at_least: float
    goal: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: a kernel on a shape.

    replaced: operands with other values than the shape's own.
    """

    kernel: str
    name: str
    shape: Any
    target: Target | None = None
    replaced: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Of queries, keys, values or tokens; decays and scales may have another."""
        return jnp.dtype(self.shape.dtype).name

    def num_bytes(self) -> int:
        """Bytes of the operands in memory."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shape.operands()))

    def operands(self, seed: int) -> dict[str, Any]:
        """Random operands, made on the device by its fast generator in one program: no temporary is large."""
        with jax.default_prng_impl("rbg"):
            operands = jax.jit(lambda: self.shape.random_operands(seed))()
        return operands | {name: jnp.asarray(value) for name, value in self.replaced.items()}


def call(kernel: str, options: Mapping[str, Any], implementation: str) -> Callable[[dict[str, Any]], Any]:
    """The kernel's public function of its operands, ready to be compiled."""
    function = getattr(module_of(kernel), kernel)

    def run(operands: dict[str, Any]) -> Any:
        return function(**operands, **options, implementation=implementation)

    return run


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The time of one case over that of another, on the same device's kernels.

    of, over: (kernel, name) of the two cases.
    """

    name: str
    of: tuple[str, str]
    over: tuple[str, str]
    target: str


def cases(kernel: str) -> list[Case]:
    """The named real shapes, and the sweeps."""
    named = [Case(kernel, name, shape, TARGETS.get((kernel, name))) for name, shape in shapes_of(kernel).items()]
    return named + SWEEPS[kernel]() if kernel in SWEEPS else named


def quick_cases(kernel: str) -> list[Case]:
    """One case that runs anywhere within seconds, in interpreters too."""
    shape = next(iter(shapes_of(kernel).values()))
    return [Case(kernel, "tiny", dataclasses.replace(shape, **TINY[kernel]))]


def _decode_sweep() -> list[Case]:
    """Llama 3 8B: batch by cache; and rows of equal and of very different lengths, with the same total."""
    swept = []
    for batch in (1, 8, 64):
        for capacity in (4096, 16384, 65536, 131072):
            target = Target("bytes", 0.80, 0.85) if batch == 8 and capacity >= 16384 else None
            shape = DecodeShape(batch, 1, 32, 8, 128, 128, capacity, capacity)
            swept.append(Case("flash_decode", f"batch {batch}, {capacity // 1024}k", shape, target))
    equal = DecodeShape(8, 1, 32, 8, 128, 128, 65536, 16384)
    return [
        *swept,
        Case("flash_decode", EQUAL, equal),
        Case("flash_decode", RAGGED, equal, replaced={"length": RAGGED_LENGTHS}),
    ]


def _prefill_sweep() -> list[Case]:
    return [Case("flash_prefill", "llama3-8b prefill, 64k", PrefillShape(1, 65536, 65536, 32, 8, 128, 128))]


EQUAL, RAGGED = "batch 8, each 16k of 64k", "batch 8, 1k to 64k, 16k on average"
RAGGED_LENGTHS = (65536, 1024, 32768, 1024, 16384, 2048, 8192, 4096)
SWEEPS: dict[str, Callable[[], list[Case]]] = {"flash_decode": _decode_sweep, "flash_prefill": _prefill_sweep}
TARGETS: dict[tuple[str, str], Target] = {
    ("flash_prefill", "llama3-8b prefill, 16k"): Target("flops", 0.60, 0.75),
    # With 128 heads to a latent, products are the bound as much as bytes; with 16 it is bytes alone.
    ("mla_decode", "deepseek-v2-lite decode, batch 8, 16k"): Target("bytes", 0.75),
    ("mla_decode", "deepseek-v3 decode, heads over eight devices, batch 64, 4k"): Target("bytes", 0.75),
    ("grouped_matmul", "deepseek-v2-lite one product, prefill 4k"): Target("flops", 0.55),
}
COMPARISONS = [
    Comparison(
        "flash_decode, ragged lengths over equal ones",
        ("flash_decode", RAGGED),
        ("flash_decode", EQUAL),
        "at most 1.15",
    ),
    Comparison(
        "dense prefill over 10 % of the blocks, 64k",
        ("flash_prefill", "llama3-8b prefill, 64k"),
        ("block_sparse_prefill", "llama3-8b, 64k, 10 % of the blocks"),
        "at least 7",
    ),
]
# A kernel's first named shape with these sizes instead.
_DECODE = {"batch": 2, "num_heads": 4, "num_kv_heads": 2, "capacity": 256, "length": 200}
_EXPERTS = {"num_tokens": 24, "num_experts": 3, "experts_per_token": 2, "input_size": 128, "output_size": 128}
TINY: dict[str, dict[str, Any]] = {
    "flash_prefill": {"num_queries": 64, "num_keys": 64, "num_heads": 2, "num_kv_heads": 1},
    "flash_decode": _DECODE,
    "paged_decode": _DECODE,
    "block_sparse_prefill": {"num_tokens": 256, "num_heads": 2, "num_kv_heads": 1, "num_lists": 2, "fraction": 0.5},
    "gather_decode": _DECODE | {"num_listed": 2},
    "mla_decode": {"batch": 2, "num_heads": 4, "capacity": 256, "length": 200},
    "grouped_matmul": _EXPERTS,
    "grouped_gate_up": _EXPERTS,
    "linear_attention": {"batch": 1, "num_tokens": 100, "num_heads": 2, "key_size": 64, "value_size": 64},
}
