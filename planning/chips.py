"""Describes chips by their data sheets: memory, arithmetic, and the network that connects them.

Nothing here is fitted to a measurement. Sources, read in 2026:
- TPU: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e (tables of specifications and of slice shapes).
- Memory that a program may use: libtpu 0.0.50's error for a larger program ("exceeds available HBM (15.75G)").
- Latency of a hop between TPUs: jax-ml.github.io/scaling-book/sharding ("typically around 1us"); a torus wraps around
  where /tpus says so: along an axis of 16 on v5e and v6e, along multiples of 4 on v5p.
- PCIe of a TPU: jax-ml.github.io/scaling-book/tpus (1.5e10 bytes per second for a chip, v6e 3.2e10).
- GPU: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM and H200 SXM; dense figures, where those are for sparsity.
- Latency between GPUs: NCCL's own cost model, src/include/tuning.h (ring, LL protocol, NVLink).
"""

from dataclasses import dataclass

from decodax.planning.network import Switch, Torus

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """One chip.

    name: as in a topology's name.
    title: its full name.
    memory_bytes: on the data sheet.
    usable_bytes: of them, for a program.
    memory_bandwidth: bytes per second.
    bf16_flops: dense peak, operations per second (a multiplication and a sum are 2).
    int8_ops: dense peak, operations per second.
    network: to other chips.
    host_bandwidth: bytes per second to the host's memory.
    slices: the shapes in which it is offered.
    """

    name: str
    title: str
    memory_bytes: int
    usable_bytes: int
    memory_bandwidth: float
    bf16_flops: float
    int8_ops: float
    network: Torus | Switch
    host_bandwidth: float
    slices: tuple[tuple[int, ...], ...]

    @property
    def is_tpu(self) -> bool:
        return isinstance(self.network, Torus)

    @property
    def fetches_ahead(self) -> bool:
        """Whether weights are prefetched while a program waits: XLA does so into a TPU's VMEM."""
        return self.is_tpu


def _tpu_slices(*names: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, name.split("x"))) for name in names)


_FLAT = _tpu_slices("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = _tpu_slices(
    "2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24"
)
_HOP_SECONDS = 1e-6
_NVLINK_LATENCY = {"launch_seconds": 3.6e-6, "step_seconds": 0.47e-6}
_UP_TO_8 = tuple((count,) for count in (1, 2, 4, 8))  # GPUs behind one NVSwitch of an HGX board

V5E = Chip(
    name="v5e",
    title="TPU v5e",
    memory_bytes=16 * GIB,  # "16 GB"; libtpu counts 15.75 GiB of them
    usable_bytes=int(15.75 * GIB),
    memory_bandwidth=819e9,
    bf16_flops=197e12,
    int8_ops=393e12,
    network=Torus(link_bandwidth=400e9 / 4 / 2, hop_seconds=_HOP_SECONDS, wraps_at=16),  # 400 GB/s, 4 ports, both ways
    host_bandwidth=1.5e10,
    slices=_FLAT,
)
V6E = Chip(
    name="v6e",
    title="TPU v6e",
    memory_bytes=32 * GIB,
    usable_bytes=int(31.24 * GIB),
    memory_bandwidth=1640e9,
    bf16_flops=918e12,
    int8_ops=1836e12,
    network=Torus(link_bandwidth=800e9 / 4 / 2, hop_seconds=_HOP_SECONDS, wraps_at=16),
    host_bandwidth=3.2e10,
    slices=_FLAT,
)
V5P = Chip(
    name="v5p",
    title="TPU v5p",
    memory_bytes=95 * GIB,
    usable_bytes=int(95.73 * GIB),  # libtpu gives a little more than the data sheet
    memory_bandwidth=2765e9,
    bf16_flops=459e12,
    int8_ops=918e12,
    network=Torus(link_bandwidth=1200e9 / 6 / 2, hop_seconds=_HOP_SECONDS, wraps_at=4),  # 1200 GB/s, 6 ports
    host_bandwidth=1.5e10,
    slices=_CUBES,
)
A100 = Chip(
    name="a100",
    title="NVIDIA A100 80GB SXM",
    memory_bytes=80 * GB,
    usable_bytes=80 * GB,
    memory_bandwidth=2039e9,
    bf16_flops=312e12,
    int8_ops=624e12,
    network=Switch(bandwidth=600e9 / 2, **_NVLINK_LATENCY),  # 600 GB/s, both ways together
    host_bandwidth=64e9 / 2,  # PCIe 4: 64 GB/s, both ways together
    slices=_UP_TO_8,
)
H100 = Chip(
    name="h100",
    title="NVIDIA H100 SXM",
    memory_bytes=80 * GB,
    usable_bytes=80 * GB,
    memory_bandwidth=3350e9,
    bf16_flops=1979e12 / 2,  # the sheet counts sparsity
    int8_ops=3958e12 / 2,
    network=Switch(bandwidth=900e9 / 2, **_NVLINK_LATENCY),
    host_bandwidth=128e9 / 2,  # PCIe 5: 128 GB/s
    slices=_UP_TO_8,
)
H200 = Chip(
    name="h200",
    title="NVIDIA H200 SXM",
    memory_bytes=141 * GB,
    usable_bytes=141 * GB,
    memory_bandwidth=4800e9,
    bf16_flops=1979e12 / 2,
    int8_ops=3958e12 / 2,
    network=Switch(bandwidth=900e9 / 2, **_NVLINK_LATENCY),
    host_bandwidth=128e9 / 2,  # PCIe 5: 128 GB/s
    slices=_UP_TO_8,
)

TPUS = {chip.name: chip for chip in (V5E, V6E, V5P)}
GPUS = {chip.name: chip for chip in (A100, H100, H200)}
