"""mla_decode against a NumPy oracle in float64, on XLA and with both kernels interpreted, and compiled for real sizes.

Interpreters start memory as NaN; what no query may read is NaN here too. Cases are few, and each mixes several awkward
things, as the GPU's interpreter takes seconds for each.
"""

import inspect
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu

from decodax.kernels_pallas import selection
from decodax.kernels_pallas.mla_decode import NewLatents, kernel_gpu, mla_decode, select_mla_decode
from decodax.kernels_pallas.mla_decode.shapes import SHAPES
from tests.kernels_pallas.ahead_of_time import CHIPS, compile_for_tpu, count_kernels

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
KERNELS = ("tpu", "gpu")
OPERANDS = ("query_latent", "query_rope", "latent", "rope_key", "new")  # what the choice depends on
# Scores and sums are float32. Weights are rounded to the latents' dtype and so is the output: an error of half a unit
# in the last place each, relative to the largest latent. float32: sums of 1,000 products in another order.
TOLERANCE = {F32: 1e-5, BF16: 2.0**-8, F16: 2.0**-10}
LSE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """`nonfinite`: a new token that is NaN."""

    num_queries: int
    num_heads: int
    rank: int
    rope_size: int
    capacity: int
    lengths: tuple[int, ...]
    num_new: int = 0
    nonfinite: int | None = None
    softcap: float | None = None
    scale: float = 0.7
    dtype: type = F32

    def operands(self):
        """Latents and rope keys behind a row's length are NaN; the second row's first query may read no new token."""
        random = np.random.default_rng(7)
        batch = len(self.lengths)

        def normal(*shape, scale=1.0):
            return jnp.asarray(random.standard_normal(shape) * scale, self.dtype)

        rows = (batch, self.num_queries, self.num_heads)
        latent, rope_key = (normal(batch, self.capacity, size) for size in (self.rank, self.rope_size))
        is_filled = (jnp.arange(self.capacity)[None, :] < jnp.array(self.lengths)[:, None])[:, :, None]
        latent, rope_key = (jnp.where(is_filled, x, jnp.nan).astype(self.dtype) for x in (latent, rope_key))
        new = None
        if self.num_new:
            new_latent, new_rope_key = (normal(batch, self.num_new, size) for size in (self.rank, self.rope_size))
            allowed = random.random((batch, self.num_queries, self.num_new)) < 0.3
            allowed[1, 0] = False
            if self.nonfinite is not None:
                new_latent = new_latent.at[:, self.nonfinite, 3].set(jnp.nan)
                allowed[:, :, self.nonfinite] = False
                allowed[-1, -1, self.nonfinite] = True
            new = NewLatents(new_latent, new_rope_key, jnp.asarray(allowed))
        queries = [normal(*rows, size, scale=size**-0.5) for size in (self.rank, self.rope_size)]
        return *queries, latent, rope_key, jnp.array(self.lengths, jnp.int32), new

    def options(self):
        return {"scale": self.scale, "softcap": self.softcap}


CASES = {
    # A row without cached tokens whose first query reads nothing at all, a row of one token, a full one, a last block
    # that starts early; new tokens in two tiles of 64; a non-finite one that one query reads.
    "tree": Case(3, 5, 128, 64, 136, (100, 0, 1, 136), num_new=70, nonfinite=68, softcap=5.0),
    # Two groups of 64 queries, runs that end within rows, rows that end within blocks and at their ends.
    "groups of queries": Case(5, 16, 256, 64, 200, (200, 64, 0, 77), scale=6.0, dtype=BF16),
    "nothing": Case(1, 2, 128, 16, 64, (0, 0)),
    # Several blocks of 512 on TPU, the last of which starts early, and two tiles of 256 queries.
    "long": Case(16, 17, 128, 64, 1000, (500, 0, 1000, 517), num_new=16, dtype=BF16),
    "capacity 63, sharp": Case(2, 7, 128, 64, 63, (63, 5), num_new=2, scale=40.0),
    "capacity 100": Case(2, 7, 256, 128, 100, (1, 100), num_new=2, dtype=BF16),
    "capacity 1001": Case(1, 2, 128, 64, 1001, (1001, 3), num_new=1),
    "rank 80": Case(1, 2, 80, 24, 64, (50, 64), num_new=1, dtype=BF16),
    "float16": Case(1, 2, 128, 64, 72, (70, 3), dtype=F16),
}
RUNS = {
    "xla": ("tree", "capacity 1001", "rank 80"),
    "tpu_interpreted": ("tree", "long", "capacity 63, sharp", "capacity 100"),
    "gpu_interpreted": ("tree", "groups of queries", "nothing"),
}
# What a kernel does not take, and what it says; XLA takes it.
MISMATCHES = {
    ("capacity 1001", "tpu"): "multiple of 8 tokens",
    ("rank 80", "tpu"): "multiple of 128 numbers",
    ("float16", "tpu"): "float32 and bfloat16",
    ("capacity 63, sharp", "gpu"): "multiple of 8 and at least 64",
    ("capacity 100", "gpu"): "multiple of 8 and at least 64",
    ("rank 80", "gpu"): "128, 256, 384 or 512 numbers",
}


def oracle(query_latent, query_rope, latent, rope_key, length, new, *, scale, softcap):
    """One query at a time, over the tokens that it may read."""
    arrays = [np.asarray(x, np.float64) for x in (query_latent, query_rope, latent, rope_key)]
    query_latent, query_rope, latent, rope_key = arrays
    output, lse = np.zeros(query_latent.shape), np.full(query_latent.shape[:3], -np.inf)
    for row, query, head in np.ndindex(lse.shape):
        tokens = np.concatenate([latent[row], rope_key[row]], axis=1)[: int(length[row])]
        if new is not None:
            fresh = np.concatenate([np.asarray(x[row], np.float64) for x in (new.latent, new.rope_key)], axis=1)
            tokens = np.concatenate([tokens, fresh[np.asarray(new.allowed[row, query])]])
        if not len(tokens):
            continue
        score = tokens @ np.concatenate([query_latent[row, query, head], query_rope[row, query, head]]) * scale
        if softcap is not None:
            score = softcap * np.tanh(score / softcap)
        weight = np.exp(score - score.max())
        output[row, query, head] = weight @ tokens[:, : latent.shape[2]] / weight.sum()
        lse[row, query, head] = score.max() + np.log(weight.sum())
    return output, lse


@pytest.mark.parametrize(("implementation", "name"), [(run, name) for run, names in RUNS.items() for name in names])
@pytest.mark.quick_cases(4)
def test_gives_the_oracles_output(implementation, name, monkeypatch):
    monkeypatch.setattr(kernel_gpu, "INTERPRETED_RUNS", 6)  # up to three parts of a row
    monkeypatch.setattr(kernel_gpu, "PARTIALS_AT_ONCE", 2)
    check(CASES[name], implementation)


@pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter of JAX 0.10 compiles a body of several threads anew for each thread of each program",
)
def test_gpu_gives_the_oracles_output_with_a_thread_per_warpgroup(monkeypatch):
    """As on a GPU, so that one warpgroup may be ahead of the other."""
    monkeypatch.setattr(kernel_gpu, "INTERPRETED_THREADS", 2)
    check(CASES["tree"], "gpu_interpreted")


def check(case, implementation):
    operands, options = case.operands(), case.options()
    output, lse = jax.jit(lambda *given: mla_decode(*given, **options, implementation=implementation))(*operands)
    assert output.dtype == case.dtype and lse.dtype == F32
    expected, expected_lse = oracle(*operands, **options)
    assert np.isnan(expected).any() == (case.nonfinite is not None)
    tolerance = TOLERANCE[case.dtype] * max(np.nanmax(np.abs(expected)), 1.0)
    np.testing.assert_allclose(np.asarray(output, np.float64), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.asarray(lse), expected_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


@pytest.mark.parametrize(("name", "backend"), MISMATCHES)
def test_what_a_kernel_does_not_take_runs_on_xla(name, backend, monkeypatch):
    case, why = CASES[name], MISMATCHES[name, backend]
    query_latent, query_rope, latent, rope_key, length, new = case.operands()
    with pytest.raises(NotImplementedError, match=why):
        operands = (query_latent, query_rope, latent, rope_key, length, new)
        mla_decode(*operands, **case.options(), implementation=f"{backend}_interpreted")
    monkeypatch.setattr(selection, "backend_of_this_device", lambda: (backend, "the device has kernels"))
    chosen = select_mla_decode(query_latent, query_rope, latent, rope_key, new)
    assert chosen.implementation == "xla" and why in chosen.reason


def test_a_kernel_runs_where_it_fits(monkeypatch):
    shape = SHAPES["deepseek-v3 decode, batch 8, 32k"].operands()
    operands = [shape[name] for name in OPERANDS]
    assert select_mla_decode(*operands).implementation == "xla"
    for backend in KERNELS:
        monkeypatch.setattr(
            selection, "backend_of_this_device", lambda backend=backend: (backend, "the device has kernels")
        )
        assert select_mla_decode(*operands).implementation == backend
    floats = [x.update(dtype=F32) for x in operands[:4]]
    assert "bfloat16 and float16" in select_mla_decode(*floats).reason
    wide = replace(SHAPES["deepseek-v3 decode, batch 8, 32k"], rope_size=128).operands()
    assert "at most 576 numbers" in select_mla_decode(*(wide[name] for name in OPERANDS)).reason


def test_lengths_beyond_the_cache_are_clipped_under_jit():
    case = CASES["capacity 63, sharp"]
    *operands, length, new = case.operands()
    run = jax.jit(lambda length: mla_decode(*operands, length, new, **case.options()))
    np.testing.assert_array_equal(run(length.at[0].set(64))[0], run(length)[0])


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_for_tpu_without_a_copy_of_the_latents(name, chip):
    """Rope keys of fewer than 128 numbers have another layout outside, and are copied; padded ones are not."""
    for shape in (SHAPES[name], replace(SHAPES[name], rope_size=128)):
        operands, options = shape.operands(), shape.options()
        compiled = compile_for_tpu(
            chip, lambda operands, options=options: mla_decode(**operands, **options, implementation="tpu"), operands
        )
        assert count_kernels(compiled, "mla_decode") == 1
        copied = {name for name, _ in copies(compiled.as_text(), operands)}
        assert copied <= ({"rope_key"} if shape.rope_size < 128 else set())
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        padded_rope_keys = operands["rope_key"].shape[0] * operands["rope_key"].shape[1] * 128 * 2
        assert temporaries < operands["latent"].size / 10 + len(copied) * padded_rope_keys


def test_steps_in_a_loop_copy_no_cache():
    """What a step writes, the next one reads where it lies; rope keys below 128 are copied on the way in and out."""
    operands = SHAPES["deepseek-v2-lite decode, batch 8, 16k"].operands()

    def steps(query_latent, query_rope, latent, rope_key, length):
        def step(_, carry):
            query_latent, latent, rope_key, length = carry
            token = NewLatents(query_latent[:, :, 0], query_rope[:, :, 0], jnp.ones((8, 1, 1), bool))
            output, lse = mla_decode(
                query_latent, query_rope, latent, rope_key, length, token, scale=0.1, implementation="tpu"
            )
            accepted = 1 + (lse[:, 0, 0] > 0).astype(jnp.int32)
            slot = (jnp.arange(8), length + accepted - 1)
            latent = latent.at[slot].set(token.latent[:, 0], mode="drop")
            rope_key = rope_key.at[slot].set(token.rope_key[:, 0], mode="drop")
            return output, latent, rope_key, length + accepted

        return jax.lax.fori_loop(0, 4, step, (query_latent, latent, rope_key, length))

    given = [operands[name] for name in ("query_latent", "query_rope", "latent", "rope_key", "length")]
    text = compile_for_tpu("v5e", steps, *given, donate_argnums=(2, 3)).as_text()
    assert "while(" in text
    copied = copies(text, operands)
    assert {name for name, _ in copied} <= {"rope_key"}
    assert all(computation.startswith("ENTRY") for _, computation in copied)


def copies(text, operands):
    """Copies of the whole cache in a program: which part of it, and in which computation."""
    computation, found = "", []
    for line in text.splitlines():
        if not line.startswith(" "):
            computation = line.split("(")[0]
        result = line.partition(" = ")[2].partition("{")[0]
        if any(f" {name}(" in line for name in ("copy", "copy-start", "transpose")):
            for name in ("latent", "rope_key"):
                batch, capacity, size = operands[name].shape
                shapes = ((batch, capacity, size), (batch, size, capacity))
                if any(f"[{','.join(map(str, shape))}]" in result for shape in shapes):
                    found.append((name, computation))
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_lowers_for_hopper(name):
    shape = SHAPES[name]
    operands = shape.operands()

    def run(operands):
        return mla_decode(**operands, **shape.options(), implementation="gpu")

    text = export.export(jax.jit(run), platforms=["cuda"])(operands).mlir_module()
    assert text.count("mosaic_gpu") >= 2


def test_bad_operands_are_told():
    case = CASES["capacity 63, sharp"]
    query_latent, query_rope, latent, rope_key, length, new = case.operands()
    good = {"query_latent": query_latent, "query_rope": query_rope, "latent": latent, "rope_key": rope_key}
    good |= {"length": length, "new": new}
    bad = {
        r"latent must have shape \(2, 63, 128\).*got \(2, 62, 128\)": {"latent": latent[:, 1:]},
        r"query_rope must have shape .*got \(2, 2, 6, 64\)": {"query_rope": query_rope[:, :, 1:]},
        r"one dtype, .*rope_key bfloat16": {"rope_key": rope_key.astype(BF16)},
        r"length must be in 0..63, got 6..64": {"length": length + 1},
        r"new.allowed must have shape \(2, 2, 2\).*got \(2, 1, 2\)": {"new": new._replace(allowed=new.allowed[:, 1:])},
        r"1 to 16 queries .*got 17": {
            "query_latent": jnp.zeros((2, 17, 7, 128)),
            "query_rope": jnp.zeros((2, 17, 7, 64)),
            "new": None,
        },
        r"1 to 128, got 129": {
            "new": NewLatents(jnp.zeros((2, 129, 128)), jnp.zeros((2, 129, 64)), jnp.ones((2, 2, 129), bool))
        },
    }
    unchecked = inspect.unwrap(mla_decode)  # outside tests nobody checks annotations
    for message, wrong in bad.items():
        with pytest.raises(ValueError, match=message):
            unchecked(**good | wrong, scale=1.0)
