"""Prefill attention against its definition, on every implementation: awkward sizes, NaN in what nobody may read."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from decodax.kernels_pallas.flash_prefill import flash_prefill, kernel_gpu, select_flash_prefill
from decodax.kernels_pallas.flash_prefill.shapes import SHAPES
from decodax.kernels_pallas.flash_prefill.spans import Blocks, Rows, Rules, Segments, blocks_to_read
from tests.kernels_pallas import oracles_flash_prefill as oracle
from tests.kernels_pallas.ahead_of_time import compile_for_tpu, count_kernels

IMPLEMENTATIONS = ["xla", "tpu_interpreted", "gpu_interpreted"]
ARRAYS = ("offset", "length", "num_sink_tokens", "sink_logits", "query_segments", "key_segments")


@dataclass(frozen=True)
class Case:
    """Sizes [T, S, N, K, H, I], the rule, and the keys that nobody reads and that hold NaN."""

    sizes: tuple[int, int, int, int, int, int]
    options: dict[str, Any]
    batch: int = 1
    unread: slice | None = None
    dtypes: tuple[str, ...] = ("float32",)
    implementations: tuple[str, ...] = field(default_factory=lambda: tuple(IMPLEMENTATIONS))

    def operands(self, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays with NaN in what nobody may read, and the same for the oracle, without."""
        num_queries, num_keys, num_heads, num_kv_heads, head_size, value_size = self.sizes
        random = np.random.default_rng(0)
        query = random.normal(size=(self.batch, num_queries, num_heads, head_size))
        key = random.normal(size=(self.batch, num_kv_heads, num_keys, head_size))
        value = random.normal(size=(self.batch, num_kv_heads, num_keys, value_size))
        plain = {name: jnp.asarray(x, dtype) for name, x in (("query", query), ("key", key), ("value", value))}
        poisoned = dict(plain)
        for name in ("key", "value"):
            nonfinite = np.array(plain[name].astype(jnp.float32))
            for row, length in enumerate(self.options.get("length", [])):
                nonfinite[row, :, int(length) :] = np.nan
            if self.unread is not None:
                nonfinite[:, :, self.unread] = np.nan
            poisoned[name] = jnp.asarray(nonfinite, dtype)
        return poisoned, {name: np.asarray(x.astype(jnp.float32)) for name, x in plain.items()}


def packed_prompts(*lengths):
    """Segments of prompts packed into one row."""
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None, :]


CASES = {
    "own tokens; a row of length 1": Case(
        (100, 100, 2, 2, 64, 64), {"causal": True, "length": np.array([63, 1])}, batch=2
    ),
    "cache of 1000, 8 heads on one; an empty row; whole blocks unread": Case(
        (65, 1000, 8, 1, 128, 128),
        {"causal": True, "offset": np.array([937, 63, 0]), "length": np.array([937, 63, 0])},
        batch=3,
        dtypes=("float32", "bfloat16"),
    ),
    "three blocks of queries, one head for 8; a prefix in the same keys": Case(
        (300, 520, 8, 1, 64, 64), {"causal": True, "offset": np.array([220])}
    ),
    "prefix and own tokens in one; window, sinks per row, softcap; head size 80": Case(
        (100, 1000, 2, 1, 80, 80),
        {
            "causal": True,
            "offset": np.array([900, 63]),
            "length": np.array([1000, 163]),
            "window": 70,
            "num_sink_tokens": np.array([3, 0]),
            "softcap": 5.0,
        },
        batch=2,
    ),
    "packed prompts, 8 of 8 heads, learned sinks; head size 96": Case(
        (133, 133, 8, 8, 96, 96),
        {
            "causal": True,
            "sink_logits": np.linspace(-3, 3, 8).astype(np.float32),
            "query_segments": packed_prompts(63, 1, 69),
            "key_segments": packed_prompts(63, 1, 69),
        },
    ),
    "not causal; head size 192 with values of 128": Case(
        (66, 304, 3, 1, 192, 128), {"causal": False, "length": np.array([300])}, dtypes=("bfloat16",)
    ),
    "cache of whole tiles of 128, which a TPU keeps with tokens in lanes; head size 64 with values of 80": Case(
        (66, 640, 2, 1, 64, 80),
        {"causal": True, "offset": np.array([538]), "length": np.array([600])},
        dtypes=("float32", "bfloat16"),
    ),
    "window far from its sinks, with blocks between; head size 256, learned sinks": Case(
        (100, 1608, 1, 1, 256, 256),
        {
            "causal": True,
            "offset": np.array([1500]),
            "length": np.array([1600]),
            "window": 64,
            "num_sink_tokens": 2,
            "sink_logits": np.array([1.0], np.float32),
        },
        unread=slice(512, 1024),
    ),
}


def call(implementation, arrays, options, scale=0.125):
    """`flash_prefill` jitted, with everything that has values as an argument."""
    dynamic = {name: jnp.asarray(options[name]) for name in ARRAYS if isinstance(options.get(name), np.ndarray)}
    static = {name: value for name, value in options.items() if name not in dynamic}
    function = jax.jit(lambda operands: flash_prefill(**operands, **static, scale=scale, implementation=implementation))
    return [np.asarray(x.astype(jnp.float32)) for x in function({**arrays, **dynamic})]


def check(output, lse, expected, value, dtype):
    """Equal to what the oracle says, empty rows included.

    float32: rounding of some 10^3 terms, relative to the largest number. bfloat16 (8 bits): weights and output are
    rounded once each, by 2^-9 relative, and a mixture of values is no larger than the largest.
    """
    expected_output, expected_lse = expected
    tolerance = 1e-5 * np.abs(expected_output).max() if dtype == "float32" else 2.0**-8 * np.abs(value).max()
    np.testing.assert_allclose(output, expected_output, rtol=0, atol=tolerance)
    largest = np.abs(expected_lse[np.isfinite(expected_lse)]).max(initial=1.0)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in CASES for dtype in CASES[name].dtypes])
@pytest.mark.quick_cases(7)
def test_is_what_the_definition_says(name, dtype, implementation):
    case = CASES[name]
    poisoned, plain = case.operands(dtype)
    output, lse = call(implementation, poisoned, case.options)
    check(output, lse, expected_of(name, dtype), plain["value"], dtype)


@pytest.fixture(scope="module", autouse=True)
def oracle_results():
    """The oracle is slow: each case once."""
    yield
    _EXPECTED.clear()


_EXPECTED: dict[tuple[str, str], Any] = {}


def expected_of(name, dtype):
    if (name, dtype) not in _EXPECTED:
        case = CASES[name]
        _EXPECTED[name, dtype] = oracle.prefill(**case.operands(dtype)[1], **case.options, scale=0.125)
    return _EXPECTED[name, dtype]


def test_warp_specialised_form_for_gpu():
    """Taken where there are many blocks; interpreted it costs seconds per block, so this is one block."""
    random = np.random.default_rng(1)
    query, key, value = (
        jnp.asarray(random.normal(size=size), jnp.float32)
        for size in ((1, 100, 1, 64), (1, 1, 400, 64), (1, 1, 400, 64))
    )
    rows = Rows(*(jnp.asarray([number], jnp.int32) for number in (290, 390, 0)))
    output, lse = kernel_gpu.flash_prefill(
        query,
        key.at[:, :, 390:].set(jnp.nan),
        value.at[:, :, 390:].set(jnp.nan),
        rows,
        None,
        None,
        scale=0.1,
        rules=Rules(True, None),
        softcap=None,
        interpret=True,
        num_warpgroups=2,
    )
    expected = oracle.prefill(query, key, value, scale=0.1, causal=True, offset=[290], length=[390])
    check(np.asarray(output), np.asarray(lse), expected, np.asarray(value), "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prefix_and_own_tokens_merge_into_the_whole(implementation):
    random = np.random.default_rng(2)
    num_cached, num_new = 200, 70
    query = random.normal(size=(1, num_new, 2, 64)).astype(np.float32)
    key, value = random.normal(size=(2, 1, 1, num_cached + num_new, 64)).astype(np.float32)
    cached, new = slice(0, num_cached), slice(num_cached, None)
    at = np.array([num_cached])
    options = {"causal": True, "offset": at, "length": at, "window": 120, "num_sink_tokens": 2}
    parts = [
        call(implementation, {"query": query, "key": key[:, :, part], "value": value[:, :, part]}, rule)
        for part, rule in ((cached, options), (new, {"causal": True, "window": 120}))
    ]
    parts = [(np.asarray(output, np.float64), np.asarray(lse, np.float64)[..., None]) for output, lse in parts]
    merged = sum(output * np.exp(lse) for output, lse in parts) / sum(np.exp(lse) for _, lse in parts)
    whole, _ = oracle.prefill(query, key, value, causal=True, offset=at, window=120, num_sink_tokens=2, scale=0.125)
    np.testing.assert_allclose(merged, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 9), (True, 40), (False, None)])
def test_only_blocks_with_a_readable_key_are_loaded(causal, window):
    query_block, key_block, num_queries, num_keys = 8, 16, 29, 150
    rows = Rows(*(jnp.asarray(x, jnp.int32) for x in ([0, 100, 121, 9], [29, 100, 150, 0], [0, 5, 33, 2])))
    blocks = blocks_to_read(
        rows, None, Rules(causal, window), num_queries=num_queries, query_block=query_block, key_block=key_block
    )
    for row in range(4):
        offset, length, num_sink_tokens = (int(x[row]) for x in rows)
        rule = {"length": length, "causal": causal, "window": window, "num_sink_tokens": num_sink_tokens}
        for block in range(4):
            queries = range(block * query_block, min((block + 1) * query_block, num_queries))
            keys = {i for i in range(num_keys) for t in queries if oracle.is_read(i, offset + t, **rule)}
            table = [x[row, block] for x in blocks]
            loaded = [int(Blocks.at(jnp.int32(step), *table[1:])) for step in range(int(table[0]))]
            assert loaded == sorted({i // key_block for i in keys})


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 12), (False, None)])
def test_a_block_needs_no_mask_if_every_query_reads_every_key(causal, window):
    rules, length = Rules(causal, window), 24
    rule = {"length": length, "causal": causal, "window": window, "num_sink_tokens": 0}

    def found(query, key):
        return rules.read_all((query, query + 3), (key, key + 4), jnp.int32(length))

    first_query, first_key = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(30), jnp.arange(26)))
    for query, key, whole in zip(first_query, first_key, jax.vmap(found)(first_query, first_key), strict=True):
        pairs = [(int(key) + i, int(query) + j) for i in range(5) for j in range(4)]
        assert bool(whole) == all(oracle.is_read(*pair, **rule) for pair in pairs)


def test_segments_bound_the_blocks_that_are_loaded():
    segments = jnp.asarray(packed_prompts(40, 24, 64))
    rows = Rows(*(jnp.asarray([x], jnp.int32) for x in (0, 128, 0)))
    blocks = blocks_to_read(
        rows, Segments(segments, segments), Rules(True, None), num_queries=128, query_block=16, key_block=16
    )
    assert blocks.num_steps.tolist() == [[1, 2, 3, 2, 1, 2, 3, 4]]
    assert blocks.skipped.tolist() == [[0, 0, 0, 2, 4, 4, 4, 4]]


@pytest.mark.parametrize(("name", "chip"), list(zip(SHAPES, ["v5e", "v6e"] * 4, strict=False)))
def test_compiles_for_tpu(name, chip):
    shape = SHAPES[name]
    operands = shape.operands()
    compiled = compile_for_tpu(
        chip, lambda arrays: flash_prefill(**arrays, **shape.options(), implementation="tpu"), operands
    )
    assert count_kernels(compiled, "flash_prefill") == 1
    # Queries and outputs are transposed; heads of 64 take the room of 128. Keys and values are not copied.
    token_bytes = 2 * shape.batch * shape.num_queries * shape.num_heads * 2 * max(256, shape.head_size)
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * token_bytes
    if "cached" in name:
        cache_bytes = 2 * operands["key"].size * 2
        assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * cache_bytes


@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_cuda(name):
    shape = SHAPES[name]
    function = jax.jit(lambda arrays: flash_prefill(**arrays, **shape.options(), implementation="gpu"))
    exported = export.export(function, platforms=["cuda"])(shape.operands())
    assert "mosaic_gpu" in exported.mlir_module()


def test_shapes_count_what_is_read():
    shape = dataclasses.replace(SHAPES["llama3-8b streaming, 16k"], num_queries=7, num_keys=90, offset=50, length=55)
    shape = dataclasses.replace(shape, window=5, num_sink_tokens=2)
    rule = {"length": 55, "causal": True, "window": 5, "num_sink_tokens": 2}
    pairs = [(t, i) for t in range(7) for i in range(90) if oracle.is_read(i, 50 + t, **rule)]
    assert shape.flops() == 2 * 32 * len(pairs) * (128 + 128)
    token_bytes = 7 * 32 * (2 * 256 + 4)
    assert shape.bytes_moved() == token_bytes + 8 * len({i for _, i in pairs}) * 2 * 256
    assert shape.random_operands(0)["key"].shape == (1, 8, 90, 128)


def described(num_queries=128, num_keys=256, num_heads=4, head_size=64, dtype=jnp.bfloat16, key_dtype=None):
    query = jax.ShapeDtypeStruct((1, num_queries, num_heads, head_size), dtype)
    key = jax.ShapeDtypeStruct((1, 2, num_keys, head_size), dtype if key_dtype is None else key_dtype)
    return query, key, key


@pytest.mark.parametrize(
    ("implementation", "changes", "says"),
    [
        ("gpu", {"dtype": jnp.float32}, "bfloat16 or all float16, these are float32"),
        ("gpu", {"head_size": 72}, "multiples of 16 up to 256, one is 72"),
        ("gpu", {"num_keys": 1001}, "a multiple of 8 tokens, this one is 1001"),
        ("tpu", {"dtype": jnp.float16}, "float32 or all bfloat16, these are float16"),
        ("tpu", {"key_dtype": jnp.float32}, "these are bfloat16, float32, float32"),
        ("tpu", {"head_size": 320}, "no larger than 256, these have 320"),
    ],
)
def test_what_a_kernel_does_not_take_goes_to_xla(implementation, changes, says):
    with pytest.raises(NotImplementedError, match=says):
        select_flash_prefill(*described(**changes), implementation=implementation)
    assert select_flash_prefill(*described(**changes)).implementation == "xla"


def test_xla_takes_a_cache_of_another_dtype():
    query, key, value = (jnp.ones(x.shape, x.dtype) for x in described(65, 65, 2, key_dtype=jnp.float32))
    output, _ = flash_prefill(query, key, value, scale=1.0, causal=True)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(output.astype(jnp.float32)), 1.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": 5, "causal": False}, "window needs causal=True"),
        ({"window": 0}, "window must be at least 1"),
        ({"num_sink_tokens": 4}, "num_sink_tokens needs a window"),
        ({"num_sink_tokens": -1, "window": 5}, "num_sink_tokens must not be negative, got -1"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"length": np.array([81])}, r"length must be in 0..80 \(there are 80 keys\), got \[81\]"),
        ({"length": np.array([-1])}, "length must be in 0..80"),
        ({"key_segments": np.zeros((1, 80), np.int32)}, "query_segments and key_segments go together"),
        ({"query": np.ones((1, 65, 3, 16), np.float32)}, "3 query heads must be a multiple of the 2 key-value heads"),
    ],
)
def test_bad_input_is_told(changes, says):
    operands = {
        "query": np.ones((1, 65, 4, 16), np.float32),
        "key": np.ones((1, 2, 80, 16), np.float32),
        "value": np.ones((1, 2, 80, 16), np.float32),
        "scale": 1.0,
        "causal": True,
    }
    operands = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in {**operands, **changes}.items()}
    with pytest.raises(ValueError, match=says):
        flash_prefill(**operands)


@pytest.mark.parametrize(
    ("query", "key", "value", "says"),
    [
        ((1, 65, 16), (1, 2, 80, 16), (1, 2, 80, 16), r"query must be \[B, T, N, H\]"),
        ((1, 65, 4, 16), (1, 2, 80, 32), (1, 2, 80, 32), "must agree in B, K, S and H"),
        ((1, 65, 4, 16), (1, 2, 80, 16), (1, 2, 79, 16), "must agree in B, K, S and H"),
        ((1, 65, 4, 16), (1, 2, 0, 16), (1, 2, 0, 16), "there must be queries and keys"),
    ],
)
def test_shapes_that_do_not_belong_together_are_told(query, key, value, says):
    with pytest.raises(ValueError, match=says):
        select_flash_prefill(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (query, key, value)))
