"""Linear attention with decay equals its recurrence on every implementation: decays from 0 to -inf."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from decodax.kernels_pallas import linear_attention as package
from decodax.kernels_pallas.linear_attention import linear_attention, linear_attention_step, select_linear_attention
from decodax.kernels_pallas.linear_attention.shapes import SHAPES, Shape
from tests.kernels_pallas.ahead_of_time import compile_for_tpu, count_kernels

IMPLEMENTATIONS = ("xla", "tpu_interpreted", "gpu_interpreted")
SCALE = 0.3

# Relative to the largest output. float32: sums of 1000 products, and on GPU exponents of 16 bits (3e-6). Narrower types
# are rounded at five places (decayed query, decayed key, score, state, output), by half a unit each: 5 x eps / 2.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5 * 2.0**-8 / 2, "float16": 5 * 2.0**-10 / 2}


def oracle(query, key, value, log_decay, state, lengths):
    """The recurrence, token by token, in float64."""
    query, key, value, log_decay, state = (np.array(x, np.float64) for x in (query, key, value, log_decay, state))
    output = np.zeros((*query.shape[:3], value.shape[3]))
    for row, length in enumerate(lengths):
        for token in range(length):
            added = key[row, token][:, :, None] * value[row, token][:, None, :]
            state[row] = np.exp(log_decay[row, token])[:, :, None] * state[row] + added
            output[row, token] = SCALE * np.einsum("nh,nhi->ni", query[row, token], state[row])
    return output, state


@dataclass(frozen=True)
class Case:
    num_tokens: int
    lengths: tuple[int, ...]
    num_heads: int
    key_size: int
    value_size: int
    per_channel: bool
    dtype: str = "float32"

    def operands(self):
        """A third of the decays are exactly 0, others weak, some down to -50, a few -inf.

        Some channels (one head) have -50 at 56 tokens: running sums of -2800, whose differences would be right to 1e-4
        only. Some have -5 at all: -320 in a chunk, and exp(320) is infinite.
        """
        random = np.random.default_rng(0)
        tokens = (len(self.lengths), self.num_tokens, self.num_heads)
        query, key = random.normal(size=(2, *tokens, self.key_size))
        value = random.normal(size=(*tokens, self.value_size))
        kind = random.uniform(size=(*tokens, self.key_size if self.per_channel else 1))
        log_decay = np.where(kind < 0.33, 0.0, -0.2 * kind)
        log_decay = np.where(kind > 0.9, (kind - 0.9) * -500, log_decay)
        log_decay = np.where(kind > 0.995, -np.inf, log_decay)
        if self.num_tokens > 63:
            flat = log_decay.reshape(*log_decay.shape[:2], -1)
            flat[:, :56, :8] = np.where(np.arange(min(flat.shape[2], 8)) < flat.shape[2] / 2, -50, flat[:, :56, :8])
            flat[:, :, 9:13] = -5
        state = random.normal(size=(len(self.lengths), self.num_heads, self.key_size, self.value_size))
        narrow = tuple(jnp.asarray(x, self.dtype) for x in (query, key, value))
        return (*narrow, jnp.asarray(log_decay, jnp.float32), jnp.asarray(state, jnp.float32))


def poisoned(operands, lengths):
    """NaN at all places without a token."""
    *tokens, state = operands
    exists = jnp.arange(tokens[0].shape[1])[None] < jnp.asarray(lengths)[:, None]
    return (*(jnp.where(exists[:, :, None, None], x, jnp.full((), jnp.nan, x.dtype)) for x in tokens), state)


EVERYWHERE = {
    "per channel, 100 tokens, lengths in both chunks": Case(100, (63, 100), 1, 64, 64, per_channel=True),
    "per head, lengths of no token, one token and all": Case(65, (0, 1, 65), 2, 64, 64, per_channel=False),
    "per head, 1000 tokens, some whole chunks missing": Case(1000, (700,), 1, 64, 128, per_channel=False),
    "per head, one token, large head": Case(1, (1,), 1, 256, 64, per_channel=False),
    "per channel, 66 tokens, head of three parts, bfloat16": Case(
        66, (65,), 1, 192, 64, per_channel=True, dtype="bfloat16"
    ),
    "per head, 63 tokens, bfloat16": Case(63, (63,), 1, 128, 64, per_channel=False, dtype="bfloat16"),
}
ELSEWHERE = {  # not on GPU
    "per channel, 1000 tokens, heads of 80 and 96": Case(1000, (600, 7), 1, 80, 96, per_channel=True),
    "per head, heads of 96 and 256": Case(300, (270,), 1, 96, 256, per_channel=False, dtype="bfloat16"),
}


def check(case, implementation):
    operands = case.operands()
    expected_output, expected_state = oracle(*operands, case.lengths)
    length = jnp.asarray(case.lengths, jnp.int32)
    run = jax.jit(
        lambda *operands: linear_attention(*operands, scale=SCALE, length=length, implementation=implementation)
    )
    output, state = run(*poisoned(operands, case.lengths))
    assert output.dtype == case.dtype and state.dtype == jnp.float32
    for found, expected in ((output, expected_output), (state, expected_state)):
        found = np.asarray(found.astype(jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[case.dtype] * np.abs(expected).max())
    for row, row_length in enumerate(case.lengths):
        assert not np.asarray(output[row, row_length:]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.quick_cases(5)
def test_equals_the_recurrence(name, implementation):
    check(EVERYWHERE[name], implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:2])
@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.quick_cases(2)
def test_equals_the_recurrence_at_sizes_the_gpu_kernel_does_not_take(name, implementation):
    check(ELSEWHERE[name], implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_calls_are_one_and_a_head_decay_is_that_of_all_channels(implementation):
    """Without lengths."""
    query, key, value, log_decay, state = Case(74, (74,), 1, 64, 64, per_channel=False).operands()
    expected, expected_state = oracle(query, key, value, log_decay, state, (74,))
    wide = jnp.broadcast_to(log_decay, query.shape)
    run = jax.jit(lambda *operands: linear_attention(*operands, scale=SCALE, implementation=implementation))
    outputs = []
    for piece in (slice(0, 37), slice(37, 74)):
        operands = (x[:, piece] for x in (query, key, value, wide))
        output, state = run(*operands, state)
        outputs.append(output)
    atol = TOLERANCE["float32"] * np.abs(expected).max()
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, rtol=0, atol=atol)
    np.testing.assert_allclose(state, expected_state, rtol=0, atol=atol)


def test_a_state_beyond_float16_stays_finite_on_gpu():
    """64 x 40 x 40 = 102,400 per entry, above 65,504. Also with no state given, for zeros."""
    shape = (1, 65, 1, 64)
    query, forty = jnp.full(shape, 1e-3, jnp.float16), jnp.full(shape, 40, jnp.float16)
    log_decay = jnp.zeros((1, 65, 1, 1))
    expected, _ = oracle(query, forty, forty, log_decay, np.zeros((1, 1, 64, 64)), (65,))
    output, _ = linear_attention(query, forty, forty, log_decay, None, scale=SCALE, implementation="gpu_interpreted")
    # the state is multiplied as bfloat16
    np.testing.assert_allclose(output.astype(jnp.float32), expected, rtol=TOLERANCE["bfloat16"])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_equal_the_recurrence(per_channel, dtype):
    case = Case(5, (5, 5), 3, 7, 11, per_channel, dtype)
    *tokens, state = case.operands()
    expected, expected_state = oracle(*tokens, state, case.lengths)
    step = jax.jit(lambda *operands: linear_attention_step(*operands, scale=SCALE))
    for token in range(case.num_tokens):
        output, state = step(*(x[:, token] for x in tokens), state)
        assert output.dtype == case.dtype
        tolerance = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype] * np.abs(expected).max()
        np.testing.assert_allclose(output.astype(jnp.float32), expected[:, token], rtol=0, atol=tolerance)
    np.testing.assert_allclose(state, expected_state, rtol=0, atol=1e-6 * np.abs(expected_state).max())


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", [name for name in SHAPES if "prefill" in name])
def test_compiles_for_tpu(chip, name):
    """Projections give [B, T, N H]: then the kernel reads them as they are, without a copy."""
    shape = SHAPES[name]
    operands = shape.operands()
    sizes = {key: operands[key].shape for key in ("query", "key", "value")}
    flat = {key: jax.ShapeDtypeStruct((*size[:2], size[2] * size[3]), shape.dtype) for key, size in sizes.items()}

    def run(operands, flat):
        tokens = {key: value.reshape(sizes[key]) for key, value in flat.items()}
        output, state = linear_attention(**{**operands, **tokens}, **shape.options(), implementation="tpu")
        return output.reshape(*output.shape[:2], -1), state

    rest = {key: operand for key, operand in operands.items() if key not in flat and key != "log_decay"}
    decays = operands["log_decay"]

    def from_gates(rest, flat, gates):
        return run({**rest, "log_decay": gates.reshape(decays.shape)}, flat)

    gates = jax.ShapeDtypeStruct((*decays.shape[:2], decays.shape[2] * decays.shape[3]), decays.dtype)
    compiled = compile_for_tpu(chip, from_gates, rest, flat, gates)
    assert count_kernels(compiled, "linear_attention") == 1
    memory = compiled.memory_analysis()
    padded = shape.value_size % 128 != 0
    assert memory.temp_size_in_bytes < (2.0 if padded else 0.05) * memory.argument_size_in_bytes


@pytest.mark.parametrize("per_channel", [True, False])
def test_lowers_for_cuda(per_channel):
    shape = Shape(2, 1000, 3, 256, 128, per_channel)
    run = jax.jit(lambda operands: linear_attention(**operands, **shape.options(), implementation="gpu"))
    module = export.export(run, platforms=["cuda"])(shape.operands()).mlir_module()
    assert "linear_attention_walk" in module
    assert ("linear_attention_prepare" in module) == per_channel


def test_unsupported_operands_are_named():
    case = Case(3, (3,), 1, 80, 64, per_channel=True)
    query, key, value, log_decay, state = case.operands()
    options = {"scale": SCALE, "implementation": "gpu_interpreted"}
    with pytest.raises(NotImplementedError, match="multiple of 64 channels, not 80 and 64: use implementation='xla'"):
        linear_attention(query, key, value, log_decay, state, **options)
    assert select_linear_attention(query, key, value, log_decay).backend == "xla"
    linear_attention(query, key, value, log_decay, state, scale=SCALE)
    half = tuple(x.astype(jnp.float16) for x in (query, key, value))
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, not float16"):
        select_linear_attention(*half, log_decay, implementation="tpu")
    with pytest.raises(NotImplementedError, match="takes one dtype, not float32, float16 and float16"):
        select_linear_attention(query, *half[1:], log_decay, implementation="tpu")
    wide = jax.ShapeDtypeStruct((1, 64, 1, 2048), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="2048 x 2048 is too large"):
        select_linear_attention(wide, wide, wide, wide, implementation="tpu")
    wide = jax.ShapeDtypeStruct((1, 64, 1, 256), jnp.float32)
    with pytest.raises(NotImplementedError, match="takes bfloat16 and float16, not float32"):
        select_linear_attention(wide, wide, wide, wide, implementation="gpu")


def test_refuses_bad_operands():
    query, key, value, log_decay, state = Case(3, (3, 3), 1, 5, 7, per_channel=True).operands()
    run = lambda log_decay=log_decay, state=state, length=None: linear_attention(
        query, key, value, log_decay, state, scale=SCALE, length=length
    )
    with pytest.raises(ValueError, match=r"log_decay must be at most 0 .* got 0.5; pass jnp.log\(decay\)"):
        run(log_decay.at[0, 1].set(0.5))
    run(log_decay.at[0, 2].set(0.5), length=jnp.array([2, 3]))  # places without a token may hold anything
    with pytest.raises(ValueError, match=r"length must be in 0..3, got 2..4"):
        run(length=jnp.array([2, 4]))
    with pytest.raises(ValueError, match="state must be float32, got bfloat16"):
        run(state=state.astype(jnp.bfloat16))

    def check_shapes(*operands):
        return package._check_shapes(*operands, None)

    with pytest.raises(ValueError, match=r"queries and keys must be .* repeat keys"):
        check_shapes(query, key[:, :2], value, log_decay, state)
    with pytest.raises(ValueError, match="there must be a row, a token"):
        check_shapes(query[:, :0], key[:, :0], value[:, :0], log_decay[:, :0], state)
    with pytest.raises(ValueError, match="one per head"):
        check_shapes(query, key, value, log_decay[..., :2], state)
    with pytest.raises(ValueError, match=r"state must be \[B, N, H, I\] = \(2, 1, 5, 7\), got \(1, 1, 5, 7\)"):
        check_shapes(query, key, value, log_decay, state[:1])
    with pytest.raises(ValueError, match="one entry per row"):
        package._check_shapes(query, key, value, log_decay, state, jnp.zeros((3,), jnp.int32))


def test_named_shapes_count_their_bytes_and_products():
    shape = Shape(2, 3, 5, 7, 11, per_channel=True)
    operands = shape.operands()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), operands) == jax.tree.map(
        lambda x: (x.shape, x.dtype), jax.eval_shape(lambda: shape.random_operands(0))
    )
    results = jax.eval_shape(lambda operands: linear_attention(**operands, **shape.options()), operands)
    arrays = *(x for name, x in operands.items() if name != "length"), *results
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    assert shape.bytes_moved() == moved
    assert shape.flops() == 2 * 3 * 5 * (2 * 7 * 11 + 2 * 7 * 11)
