"""Rounds a model's weights to what a packed checkpoint can hold, and packs them: FP8 by blocks, and mxfp4."""

from typing import Any

import ml_dtypes
import numpy as np

FP8_LARGEST = 448.0
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
GROUP = 32  # numbers that share a scale in mxfp4

Tensors = dict[str, Any]


def packed_fp8(tensors: Tensors, block: tuple[int, int]) -> tuple[Tensors, Tensors]:
    """(rounded, packed): the projections in FP8 with a scale per block; norms, embeddings and routers as they are."""
    import torch

    rounded, packed = {}, {}
    for name, tensor in tensors.items():
        if "_proj" not in name or tensor.ndim != 2:
            rounded[name] = packed[name] = tensor
            continue
        weight = tensor.numpy()
        rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
        scale = np.zeros((rows, columns), np.float32)
        for i, j in np.ndindex(rows, columns):
            values = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale[i, j] = np.abs(values).max() / FP8_LARGEST
        wide = scale.repeat(block[0], 0).repeat(block[1], 1)[: weight.shape[0], : weight.shape[1]]
        codes = (weight / wide).astype(ml_dtypes.float8_e4m3fn)
        rounded[name] = torch.from_numpy(codes.astype(np.float32) * wide)
        packed[name] = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = torch.from_numpy(scale)
    return rounded, packed


def packed_mxfp4(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """(rounded, packed): the experts' matrices, stored [E, inputs, outputs] plainly and [E, outputs, inputs] packed."""
    import torch

    rounded, packed = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 3:
            rounded[name] = packed[name] = tensor
            continue
        weight = tensor.numpy().swapaxes(1, 2)
        groups = weight.reshape(*weight.shape[:2], -1, GROUP)
        exponent = np.ceil(np.log2(np.abs(groups).max(axis=-1) / FP4_VALUES[-1]))
        scale = np.exp2(exponent).astype(np.float32)[..., None]
        code = np.abs(np.abs(groups / scale)[..., None] - FP4_VALUES).argmin(axis=-1).astype(np.uint8)
        sign = (groups < 0).astype(np.uint8)
        values = np.where(sign, -1, 1).astype(np.float32) * FP4_VALUES[code] * scale
        rounded[name] = torch.from_numpy(values.reshape(weight.shape).swapaxes(1, 2).copy())
        code |= sign << 3
        packed[f"{name}_blocks"] = torch.from_numpy(code[..., 0::2] | code[..., 1::2] << 4)
        packed[f"{name}_scales"] = torch.from_numpy((exponent + 127).astype(np.uint8))
    return rounded, packed
