"""Holds the sizes of a Hopper GPU that kernels need. NVIDIA H100 Tensor Core GPU Architecture, white paper V1.04."""

import jax

CORES = 132  # multiprocessors of an H100 SXM and an H200
CORE_SHARED_BYTES = 233_472  # shared memory of a multiprocessor; each program on it takes 1,024 more than it asks for
_FIRST_WRONG, _FIRST_RIGHT = 12_080, 12_091  # versions of CUDA
PROGRAM_SHARED_BYTES = 232_448  # the most of one program


def miscompiled_reason() -> str | None:
    """Why kernels with causal masks do not run on this process's CUDA; None where they do, or there is none.

    JAX's own attention (`jax.experimental.pallas.ops.gpu.attention_mgpu`) refuses the same versions. 12.9.1 is said to
    be right, but the runtime of every 12.9 calls itself 12090.
    """
    version = cuda_version()
    if version is None or not _FIRST_WRONG <= version < _FIRST_RIGHT:
        return None
    return (
        f"ptxas of CUDA {version // 1000}.{version % 1000 // 10} may compile causal masks wrongly: install CUDA 13 (as "
        "the extra cuda13 does)"
    )


def cuda_version() -> int | None:
    """Of the CUDA runtime, as in 12080 for 12.8; None without one."""
    try:
        from jax._src.lib import cuda_versions  # JAX shows it nowhere else

        return None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()
    except Exception:  # another version of JAX; a plug-in without a driver
        return None


def num_cores() -> int:
    """Multiprocessors of this process's GPU; those of an H100 without a GPU, as when compiling ahead of time."""
    if jax.default_backend() != "gpu":
        return CORES
    return int(getattr(jax.devices()[0], "core_count", CORES))
