"""Holds the sizes of a Hopper GPU that kernels need. NVIDIA H100 Tensor Core GPU Architecture, white paper V1.04."""

import jax

CORES = 132  # multiprocessors of an H100 SXM and an H200
CORE_SHARED_BYTES = 233_472  # shared memory of a multiprocessor; each program on it takes 1,024 more than it asks for
PROGRAM_SHARED_BYTES = 232_448  # the most of one program


def num_cores() -> int:
    """Multiprocessors of this process's GPU; those of an H100 without a GPU, as when compiling ahead of time."""
    if jax.default_backend() != "gpu":
        return CORES
    return int(getattr(jax.devices()[0], "core_count", CORES))
