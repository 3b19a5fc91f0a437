"""A package from outside, installed with pip, provides a drafter, a verifier and a cache policy that work.

Its source is in `outside/`. Nothing of decodax is changed or registered for it.
"""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from decodax import decoding
from decodax.core import pytree
from decodax.decoding.drafters import Drafter, Recording, Replay, fixed_proposal
from decodax.decoding.verifiers import ExactMatch
from decodax.layers.kv_cache.contract import Cache, CachePolicy
from decodax.layers.kv_cache.full import KVCache
from decodax.sharding.constraints import shardings
from decodax.sharding.mesh import read_mesh
from decodax.sharding.rules import RULES
from tests.speculation import CAPACITY, MODEL, PARAMS, VOCABULARY, plain, plain_decode, start, texts

SOURCE = Path(__file__).parent / "outside"
DECAY = 0.5


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The installed module: not a file of this repository."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    install = [*pip, "install", "--no-deps", "--no-index", "--no-cache-dir", "--target", str(target), str(SOURCE)]
    subprocess.run(install, check=True, timeout=300)
    sys.path.insert(0, str(target))
    try:
        module = importlib.import_module("speculation_plugin")
        assert Path(module.__file__).is_relative_to(target)
        yield module
    finally:
        sys.path.remove(str(target))
        sys.modules.pop("speculation_plugin", None)


def run(drafter, verifier, draft_params=None, **options):
    decode = jax.jit(decoding.speculative(MODEL, drafter, verifier), donate_argnums=2)
    return decode(PARAMS, draft_params, start(**options))


def test_the_drafter(plugin):
    """Output is plain decoding's, drafts are accepted, and its own state follows from the whole text."""
    state = run(plugin.LastSuccessor(3, VOCABULARY), ExactMatch())
    np.testing.assert_array_equal(state.tokens, plain().tokens)
    np.testing.assert_allclose(state.logprobs, plain().logprobs, atol=2e-5)
    assert np.asarray(state.counts.accepted_lengths)[1:].sum() > 3
    want = np.zeros((3, VOCABULARY), int)
    for row, text in enumerate(texts(state)):
        for place in range(1, len(text)):
            want[row, text[place - 1]] = place
    np.testing.assert_array_equal(state.draft, want)


def test_the_verifier(plugin):
    """It accepts at least what exact matching does; with one token it is exact matching."""
    recording = Recording.create(np.asarray(plain().tokens), wrong_rate=0.0)
    # The second most probable token, in turns with the most probable: half of the drafts differ from plain decoding.
    recording = dataclasses.replace(recording, is_wrong=jnp.asarray(np.arange(CAPACITY)[None, :] % 2 == [[0]] * 3))
    exact, one, all_ = (
        run(Replay(4, VOCABULARY), verifier, recording)
        for verifier in (ExactMatch(), plugin.AmongTopTokens(1), plugin.AmongTopTokens(VOCABULARY))
    )
    for got, want in zip(jax.tree.leaves(one), jax.tree.leaves(exact), strict=True):
        np.testing.assert_array_equal(got, want)
    assert int(all_.num_target_forwards) < int(exact.num_target_forwards)
    np.testing.assert_array_equal(all_.counts.accepted, all_.counts.proposed)
    assert (np.asarray(all_.tokens) != np.asarray(exact.tokens)).any()  # lossy
    assert not np.asarray(all_.failed).any()


def test_the_verifier_refuses_sampled_rows(plugin):
    with pytest.raises(ValueError, match="got a temperature above 0: set it to 0"):
        run(Replay(0, VOCABULARY), plugin.AmongTopTokens(3), recording_of_plain(), options="sampled")


def recording_of_plain(wrong_rate=0.3):
    return Recording.create(np.asarray(plain().tokens), wrong_rate=wrong_rate)


def watched(plugin):
    """A policy whose cache is the plugin's, with two more beside it, written by the same commits.

    One keeps keys and values unchanged, the other is recurrent: its state is DECAY x itself + key, token by token.
    """

    @pytree.dataclass
    class Watched:
        small: plugin.Int8Cache
        rows: KVCache
        recurrent: jax.Array

        @classmethod
        def empty(cls, batch_size, num_kv_heads, capacity, head_size, dtype):
            sizes = (batch_size, num_kv_heads, capacity, head_size, dtype)
            recurrent = jnp.zeros((batch_size, num_kv_heads, head_size))
            return cls(plugin.Int8Cache.empty(*sizes), KVCache.empty(*sizes), recurrent)

        length = property(lambda self: self.small.length)
        capacity = property(lambda self: self.small.capacity)

        def read(self, begin, num_tokens):
            return self.small.read(begin, num_tokens)

        def commit(self, rows, count, path=None):
            keys, recurrent = rows.key, self.recurrent
            if path is not None:
                keys = jnp.take_along_axis(keys, path[:, None, :, None], axis=2)
            for token in range(keys.shape[2]):
                is_taken = (token < count)[:, None, None]
                recurrent = jnp.where(is_taken, DECAY * recurrent + keys[:, :, token], recurrent)
            small, whole = (cache.commit(rows, count, path) for cache in (self.small, self.rows))
            return Watched(small, whole, recurrent)

    return Watched


@dataclasses.dataclass(frozen=True)
class Forked(Drafter):
    """A chain as a tree, in which every node has an earlier sibling with another token."""

    chain: Replay
    num_nodes = property(lambda self: 2 * self.chain.num_tokens + 1)
    max_depth = property(lambda self: self.chain.num_tokens)

    def propose(self, params, draft_params, state):
        proposal, draft = self.chain.propose(params, draft_params, state)
        token, is_candidate = (jnp.repeat(x, 2, axis=1)[:, 1:] for x in (proposal.token, proposal.is_candidate))
        token = token.at[:, 1::2].add(1) % VOCABULARY
        tree = decoding.Tree.fixed([-1, *(2 * (node // 2) for node in range(self.num_nodes - 1))])
        return fixed_proposal(tree, token, is_candidate), draft


def test_its_cache_is_split_over_a_mesh(plugin):
    """By the axes that its class names, as annotations say nothing."""
    mesh = read_mesh("data=2,context=2,tensor=2")
    cache = jax.eval_shape(lambda: plugin.Int8Cache.empty(4, 2, 16, 5, jnp.float32))
    found = shardings(cache, mesh, RULES)
    assert found.key.spec == found.value.spec == PartitionSpec("data", "tensor", "context", None)
    assert found.key_scale.spec == PartitionSpec("data", "tensor", "context")
    assert found.length.spec == PartitionSpec("data")


@pytest.mark.parametrize("drafter", [Replay(4, VOCABULARY), Forked(Replay(3, VOCABULARY))], ids=["chain", "tree"])
@pytest.mark.quick_cases(1)
def test_the_cache_policy(plugin, drafter):
    """Nothing of a rejected node reaches the small cache or a recurrent state, bit for bit.

    Every layer's small cache holds, bit for bit, the quantised keys and values of accepted tokens. These are plain
    decoding's where they depend on the tokens alone (the first layer), and not in later layers: a draft token attends
    to earlier draft tokens unquantised, where plain decoding reads them quantised.
    """
    assert isinstance(plugin.Int8Cache, CachePolicy)
    policy = watched(plugin)
    want = plain_decode(PARAMS, start(cache_policy=policy))
    got = run(drafter, ExactMatch(), recording_of_plain(), cache_policy=policy)
    assert isinstance(got.caches[0].small, Cache)
    np.testing.assert_array_equal(got.tokens, want.tokens)  # not guaranteed with a lossy cache, but true here
    assert int(got.num_target_forwards) < int(want.num_target_forwards)
    rejected = int(got.counts.proposed.sum()) - int(got.counts.accepted.sum())
    assert rejected > 10
    quantise = jax.jit(plugin.quantised)
    for cache in got.caches:
        for row, length in enumerate(np.asarray(got.length) - 1):
            assert cache.small.length[row] == cache.rows.length[row] == length
            assert not np.asarray(cache.small.key_scale[row, :, length:]).any()
            recurrent = np.zeros(cache.recurrent.shape[1:])
            for token in range(length):
                recurrent = DECAY * recurrent + np.asarray(cache.rows.key[row, :, token], np.float64)
            # Keys of size up to 10, halved at every token.
            np.testing.assert_allclose(cache.recurrent[row], recurrent, atol=1e-5)
        for name in ("key", "value"):
            integers, scale = quantise(getattr(cache.rows, name))
            np.testing.assert_array_equal(getattr(cache.small, name), integers)
            np.testing.assert_array_equal(getattr(cache.small, f"{name}_scale"), scale)
    for name in ("key", "value"):
        mine, theirs = (state.caches[0].small for state in (got, want))
        # The same sums over 23 features, whose order may depend on how many tokens a forward has.
        np.testing.assert_allclose(getattr(mine, f"{name}_scale"), getattr(theirs, f"{name}_scale"), rtol=1e-6)
        difference = np.abs(np.asarray(getattr(mine, name), int) - np.asarray(getattr(theirs, name), int))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.001
