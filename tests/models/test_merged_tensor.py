"""The rows of a merged tensor are those of a plain sum in float64, with the same bits whatever is read with them."""

import ml_dtypes
import numpy as np

from decodax.models.checkpoints.adapters.merged_tensor import MergedTensor


class Plain:
    """A stored tensor in memory."""

    kind, label, mappings = "BF16", "plain", ()

    def __init__(self, numbers):
        self.numbers, self.shape, self.dtype = numbers, numbers.shape, numbers.dtype

    def rows(self, index):
        return self.numbers[index]


def test_a_row_has_the_same_bits_whatever_is_read_with_it():
    rng = np.random.default_rng(7)
    base = rng.standard_normal((211, 83)).astype(ml_dtypes.bfloat16)
    left, right = rng.standard_normal((211, 37)).astype(np.float32), rng.standard_normal((37, 83)).astype(np.float16)
    tensor = MergedTensor(Plain(base), left[None], right[None], 0.7, "merged", ())
    full = tensor.rows(slice(None))
    assert full.dtype == np.float32 and tensor.dtype == base.dtype
    wanted = base.astype(np.float64) + np.float64(np.float32(0.7)) * left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(full, wanted, rtol=1e-5, atol=37 * 2**-22)
    for index in (slice(3, 4), slice(60, 131), np.array([0, 63, 64, 65, 200]), np.arange(1, 211, 7), slice(2, 211, 13)):
        np.testing.assert_array_equal(tensor.rows(index), full[index])
    assert base.dtype == ml_dtypes.bfloat16 and not np.shares_memory(full, base)
    wide = MergedTensor(Plain(base.astype(np.float64)), left[None], right[None], 0.7, "merged", ())
    assert wide.rows(slice(5, 9)).dtype == np.float64


def test_rows_of_a_stack():
    rng = np.random.default_rng(11)
    base = rng.standard_normal((3, 67, 13)).astype(np.float32)
    left, right = rng.standard_normal((3, 67, 5)).astype(np.float32), rng.standard_normal((3, 5, 13)).astype(np.float32)
    stack = Plain(base.reshape(-1, 13))
    stack.shape = base.shape
    tensor = MergedTensor(stack, left, right, -2.5, "merged", ())
    wanted = (base - 2.5 * np.einsum("eor,eri->eoi", left.astype(np.float64), right)).reshape(-1, 13)
    for index in (slice(None), slice(60, 140), np.array([0, 66, 67, 131, 133, 134, 200])):
        np.testing.assert_allclose(tensor.rows(index), wanted[index], rtol=2**-20, atol=2**-20)
