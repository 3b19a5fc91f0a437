"""The decode kernels compile for absent TPUs at real sizes, without copies of the cache."""

from importlib import import_module

import jax
import jax.numpy as jnp
import pytest

from decodax.kernels_pallas import module_of
from decodax.kernels_pallas.flash_decode import NewTokens, flash_decode
from decodax.layers.kv_cache.full import KVCache, KVUpdate
from tests.kernels_pallas.ahead_of_time import CHIPS, compile_for_tpu, count_kernels

KERNELS = ("flash_decode", "paged_decode", "gather_decode")


def shapes_of(kernel):
    return import_module(f"{module_of(kernel).__name__}.shapes").SHAPES


CASES = [(kernel, name) for kernel in KERNELS for name in shapes_of(kernel)]


def copies(text, shape):
    """Lines of a program that copy an array of this shape."""
    found = []
    for line in text.splitlines():
        made = line.partition(" = ")[2].partition("{")[0]
        is_copy = any(f" {name}(" in line for name in ("copy", "copy-start", "transpose"))
        if is_copy and ",".join(map(str, shape)) in made:
            found.append(line)
    return found


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("kernel", "name"), CASES)
def test_compiles_for_tpu_without_a_copy_of_the_cache(kernel, name, chip):
    """XLA copies pages only where neither page size nor head size is a multiple of 128."""
    shape = shapes_of(kernel)[name]
    operands = shape.operands()

    def run(operands):
        return getattr(module_of(kernel), kernel)(**operands, **shape.options(), implementation="tpu")

    compiled = compile_for_tpu(chip, run, operands)
    assert count_kernels(compiled, kernel) == 1
    caches = [operands[name] for name in ("key", "value", "key_pages", "value_pages") if name in operands]
    if all(cache.shape[3] % 128 == 0 or cache.shape[2] % 128 == 0 for cache in caches):
        smallest = min(cache.size * cache.dtype.itemsize for cache in caches)
        assert compiled.memory_analysis().temp_size_in_bytes < smallest / 20
        assert not any(copies(compiled.as_text(), cache.shape) for cache in caches)


def test_steps_in_a_loop_copy_no_cache():
    """The next step reads in place what a step wrote."""

    def steps(query, cache):
        def step(_, carry):
            query, cache = carry
            token = query[:, :, :8].swapaxes(1, 2)
            new = NewTokens(token, token, jnp.ones((8, 1, 1), bool))
            operands = (query, cache.key, cache.value, cache.length, new)
            output, _ = flash_decode(*operands, scale=0.1, implementation="tpu")
            accepted = 1 + (output[:, 0, 0, 0] > 0).astype(jnp.int32)
            return output, cache.commit(KVUpdate(token, token), accepted)

        return jax.lax.fori_loop(0, 4, step, (query, cache))

    cache = jax.eval_shape(lambda: KVCache.empty(8, 8, 4096, 128, jnp.bfloat16))
    query = jax.ShapeDtypeStruct((8, 1, 32, 128), jnp.bfloat16)
    text = compile_for_tpu("v5e", steps, query, cache, donate_argnums=1).as_text()
    assert "while(" in text
    assert copies(text, cache.key.shape) == []
