"""Attention of prompts whose tokens are split over devices: ring and Ulysses, against the definition in float64."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from decodax.core.partial_softmax import PartialSoftmax
from decodax.kernels_pallas.flash_prefill import flash_prefill
from decodax.sharding.ring import is_zigzag, ring
from decodax.sharding.ulysses import num_copies, ulysses
from tests.kernels_pallas import oracles_flash_prefill as oracle
from tests.sharding.collectives import count

# float32 sums of at most 80 weighted values of size about 1, in parts of which up to 17 are merged.
TOLERANCE = 2e-5
SCALE = 0.4


def over_devices(function, num_devices):
    """`function` of a device's tokens, as one of all tokens."""
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("context",))
    query, rows = PartitionSpec(None, "context"), PartitionSpec(None, None, "context")
    specs = {"in_specs": (query, rows, rows), "out_specs": PartialSoftmax(query, query)}
    return jax.jit(jax.shard_map(function, mesh=mesh, **specs, check_vma=False))


def in_a_ring(num_devices, window=None, softcap=None, attention=None):
    def blocks(query, key, value, offset):
        options = {"scale": SCALE, "causal": True, "window": window, "softcap": softcap, "implementation": "xla"}
        return PartialSoftmax(*flash_prefill(query, key, value, offset=jnp.full(query.shape[0], offset), **options))

    return over_devices(partial(ring, attention=attention or blocks, axis="context", window=window), num_devices)


def by_heads(num_devices, window=None, softcap=None):
    def whole(query, key, value):
        options = {"scale": SCALE, "causal": True, "window": window, "softcap": softcap, "implementation": "xla"}
        return PartialSoftmax(*flash_prefill(query, key, value, **options))

    return over_devices(partial(ulysses, attention=whole, axis="context"), num_devices)


def operands(num_tokens, heads=6, kv_heads=3, size=5, value_size=5):
    random = np.random.default_rng(num_tokens)
    draw = lambda *shape: random.standard_normal((2, *shape)).astype(np.float32)
    return (
        draw(num_tokens, heads, size),
        draw(kv_heads, num_tokens, size),
        draw(kv_heads, num_tokens, value_size),
    )


def check(function, arrays, **options):
    want, want_lse = oracle.prefill(*arrays, scale=SCALE, causal=True, **options)
    got = function(*arrays)
    np.testing.assert_allclose(got.output, want, atol=TOLERANCE)
    np.testing.assert_allclose(got.lse, want_lse, atol=TOLERANCE)


GROUPED = {"heads": 6, "kv_heads": 3}
SHARED = {"heads": 7, "kv_heads": 1, "size": 3, "value_size": 2}


@pytest.mark.parametrize(
    ("num_devices", "num_tokens", "sizes", "window", "softcap", "in_zigzag"),
    [
        (8, 80, GROUPED, None, None, True),  # blocks of 5
        (3, 42, SHARED, None, 1.5, True),  # an odd number of devices, blocks of 7
        (2, 4, GROUPED, None, None, True),  # blocks of one token
        (8, 80, SHARED, 61, None, True),  # a window that spans most of the devices
        (8, 80, GROUPED, 23, 1.5, False),  # four devices are read
        (4, 44, SHARED, 12, None, False),  # the window ends with the token before the device's first
        (4, 44, GROUPED, 1, None, False),  # nobody reads another device
        (5, 35, GROUPED, None, None, False),  # seven tokens cannot be halved
    ],
)
@pytest.mark.quick_cases(3)
def test_ring(num_devices, num_tokens, sizes, window, softcap, in_zigzag):
    assert is_zigzag(num_tokens // num_devices, num_devices, window) == in_zigzag
    check(in_a_ring(num_devices, window, softcap), operands(num_tokens, **sizes), window=window, softcap=softcap)


@pytest.mark.parametrize(
    ("num_devices", "heads", "kv_heads", "value_size", "window", "softcap"),
    [
        (2, 8, 4, 5, None, None),  # key-value heads divide
        (8, 8, 8, 5, 13, None),
        (4, 12, 2, 5, None, 1.5),  # each exists twice
        (4, 12, 3, 5, None, None),  # each exists four times: three heads over four devices
        (8, 24, 1, 3, 29, 1.5),  # and values of another size
    ],
)
def test_ulysses(num_devices, heads, kv_heads, value_size, window, softcap):
    arrays = operands(40, heads, kv_heads, 5, value_size)
    check(by_heads(num_devices, window, softcap), arrays, window=window, softcap=softcap)


def test_ulysses_needs_heads_that_divide():
    assert num_copies(6, 3, 4) is None
    with pytest.raises(ValueError, match=r"6 heads do not divide over 4 .*context='ring'"):
        by_heads(4)(*operands(40))


def test_only_permutes():
    """Two sets of them: in the loop, and before it. In zigzag order the results come back, too."""
    arrays = operands(80)
    compiled = in_a_ring(8).lower(*arrays).compile()
    assert set(count(compiled)) == {"collective-permute"}
    assert count(compiled)["collective-permute"] == 2 * 3 + 4 + 4 + 2 * 2
    # In natural order, which three steps end, keys and values travel twice: one step in the loop, and one before it.
    assert count(in_a_ring(8, window=21).lower(*arrays).compile()) == {"collective-permute": 4}
    assert count(in_a_ring(8, window=1).lower(*arrays).compile()) == {}


def test_only_all_to_alls():
    """Queries, keys and values together; what comes out, and its log-sum-exps."""
    assert count(by_heads(3).lower(*operands(42)).compile()) == {"all-to-all": 3}
    assert count(by_heads(3).lower(*operands(42, value_size=2)).compile()) == {"all-to-all": 5}
    without_lse = jax.jit(lambda *arrays: by_heads(3)(*arrays).output)
    assert count(without_lse.lower(*operands(42)).compile()) == {"all-to-all": 2}


def test_zigzag_order_shares_out_the_work():
    """Every device reads as many blocks as the others, none of them in vain; each pair of tokens is read once."""
    num_devices, block = 8, 3
    products = Counter()

    def counting(query, key, value, offset):
        """Mixes nothing, and has as log-sum-exp the logarithm of how many keys a query reads."""
        assert query.shape[1] == key.shape[2] == block
        read = jnp.clip(offset + 1 + jnp.arange(block), 0, block)
        is_whole = jnp.all(read == block)
        note = lambda device, is_whole: products.update({(int(device), "whole" if is_whole else "own"): 1})
        jax.debug.callback(note, jax.lax.axis_index("context"), is_whole)
        lse = jnp.broadcast_to(jnp.log(read.astype(jnp.float32))[None, :, None], query.shape[:3])
        return PartialSoftmax(jnp.zeros((*query.shape[:3], value.shape[3])), lse)

    lse = in_a_ring(num_devices, attention=counting)(*operands(2 * num_devices * block)).lse
    jax.effects_barrier()
    keys_read = np.broadcast_to(np.arange(1, 2 * num_devices * block + 1)[None, :, None], lse.shape)
    np.testing.assert_allclose(np.exp(lse), keys_read, rtol=1e-5)
    for device in range(num_devices):
        assert (products[device, "own"], products[device, "whole"]) == (2, 1 + 2 * (num_devices - 1))


def two_pass_ring(query, key, value, *, num_devices):
    """Ring Self-Attention as it was published: all keys go round for the scores, then all values for the mixture."""
    device, num_tokens = jax.lax.axis_index("context"), query.shape[1]
    to_next = [(index, (index + 1) % num_devices) for index in range(num_devices)]
    shape = (query.shape[0], query.shape[2], num_tokens, num_devices, num_tokens)
    scores, travelling = jnp.zeros(shape), jnp.repeat(key, query.shape[2] // key.shape[1], axis=1)
    for step in range(num_devices):
        other = (device - step) % num_devices
        score = SCALE * jnp.einsum("btnh,bnsh->bnts", query, travelling)
        at = device * num_tokens + jnp.arange(num_tokens)[:, None] - other * num_tokens - jnp.arange(num_tokens)[None]
        scores = scores.at[:, :, :, other].set(jnp.where(at[None, None] >= 0, score, -jnp.inf))
        travelling = jax.lax.ppermute(travelling, "context", to_next)
    flat = scores.reshape(*shape[:3], -1)
    weights = jax.nn.softmax(flat, axis=-1).reshape(shape)
    output, travelling = 0.0, jnp.repeat(value, query.shape[2] // value.shape[1], axis=1)
    for step in range(num_devices):
        other = (device - step) % num_devices
        output += jnp.einsum("bnts,bnsi->btni", jnp.take(weights, other, axis=3), travelling)
        travelling = jax.lax.ppermute(travelling, "context", to_next)
    return PartialSoftmax(output, jnp.moveaxis(jax.nn.logsumexp(flat, axis=-1), 1, 2))


def test_one_pass_is_the_two_passes_of_ring_self_attention():
    arrays = operands(40)
    want = over_devices(partial(two_pass_ring, num_devices=4), 4)(*arrays)
    got = in_a_ring(4)(*arrays)
    for one, two in zip(got, want, strict=True):
        np.testing.assert_allclose(one, two, atol=TOLERANCE)
