"""Shared by tests of speculative decoding: a target, a draft that often agrees with it, prompts, plain decoding."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from decodax import decoding
from decodax.decoding.logits_processors import History
from tests.oracles import logits_processors
from tests.tiny import tiny_model

MODEL, PARAMS = tiny_model()
VOCABULARY = MODEL.config.vocab_size
LENGTHS = np.array([5, 13, 1])
PROMPTS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 13))
NEW = np.array([29, 24, 33])  # so that each row alone has buffers of the same size as all three
CAPACITY = 40
# Logits of at most 5, keys and values of about 1, from float32 sums whose order depends on how many tokens run at once.
TOLERANCE = 2e-5
NO_STOPS = (-1, -1)  # always two stop tokens, so that runs with and without share compiled code
OPTIONS = {
    "greedy": {},
    "sampled": {"temperature": [0.0, 0.7, 1.3]},
    "every option": {
        "temperature": [0.0, 0.7, 1.3],
        "top_k": [0, 30, 11],
        "top_p": [1.0, 0.9, 0.95],
        "min_p": 0.001,
        "typical_p": 0.98,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": [0.2, 0.1, -0.2],
        "logit_bias": {5: 1.5, 7: -2.0},
        "min_new_tokens": [7, 0, 11],
        "end_token_ids": (13, 30),
    },
}

# One per row, off in the other rows. They favour tokens of the text: a draft whose own tokens count repeats itself.
PENALTIES = {
    "repetition_penalty": [1.0, 1.0, 0.2],
    "presence_penalty": [0.0, -4.0, 0.0],
    "frequency_penalty": [-4.0, 0.0, 0.0],
}


def disturbed(params, amount, seed=7):
    """Parameters with noise on each: a draft that mostly agrees."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [leaf + amount * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


DRAFT_PARAMS = disturbed(PARAMS, 0.03)


def start(rows=slice(None), *, new=NEW, params=PARAMS, options="greedy", stop_token_ids=NO_STOPS, **init_options):
    """The state of some of the three prompts."""
    index = np.arange(3)[rows]
    per_row = {
        name: [value[i] for i in index] if isinstance(value, list) else value
        for name, value in OPTIONS[options].items()
    }
    sampling = decoding.Sampling.create(len(index), VOCABULARY, **per_row)
    new = np.broadcast_to(new, 3)[rows]
    return decoding.prefill(
        MODEL, params, PROMPTS[rows], LENGTHS[rows], new, index, sampling=sampling, stop_token_ids=stop_token_ids,
        **init_options,
    )  # fmt: skip


plain_decode = jax.jit(decoding.autoregressive(MODEL), donate_argnums=1)


@cache
def plain(options="greedy"):
    """The state in which plain decoding of all three prompts ends."""
    return plain_decode(PARAMS, start(options=options))


def texts(state):
    """Prompt and output of every row."""
    return [np.asarray(row)[:length] for row, length in zip(state.tokens, np.asarray(state.length), strict=True)]


@jax.jit
def forward(params, tokens):
    """Hidden states, cache updates and logits of texts, without a cache."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    out = MODEL.apply(params, tokens, position, capture=(0, 1, 2))
    return out, MODEL.logits(params, out.hidden)


def padded(rows, width=CAPACITY + 8):
    """Texts as one array, padded with zeros."""
    tokens = np.zeros((len(rows), width), np.int32)
    for row, text in enumerate(rows):
        tokens[row, : len(text)] = text
    return jnp.asarray(tokens)


def assert_same(got, want, rows=(0, 1, 2)):
    """Everything that plain decoding determines, in rows of `want`."""
    index = np.array(rows)
    for name in ("tokens", "length", "limit", "done", "failed"):
        np.testing.assert_array_equal(getattr(got, name), np.asarray(getattr(want, name))[index], err_msg=name)
    np.testing.assert_allclose(got.logprobs, np.asarray(want.logprobs)[index], atol=TOLERANCE)
    for count, wanted in zip(jax.tree.leaves(got.history), jax.tree.leaves(want.history), strict=True):
        np.testing.assert_array_equal(count, np.asarray(wanted)[index])
    assert_same_caches(got.caches, want.caches, rows)


def assert_same_caches(got, want, rows=(0, 1, 2)):
    """Everything that caches of any kind hold; tokens marked as kept are compared only where both mark them.

    Complete buffers: nothing of a rejected node is after the tokens either. A recurrent state sums up all tokens, so
    its tolerance is relative to its size.
    """
    index = np.array(rows)
    for cache_, wanted in zip(got, want, strict=True):
        marks = getattr(cache_, "kept", None) is not None and getattr(wanted, "kept", None) is not None
        for field in dataclasses.fields(wanted):
            if field.name == "kept" and not marks:
                continue
            leaves, wanted_leaves = (jax.tree.leaves(getattr(one, field.name)) for one in (cache_, wanted))
            for leaf, wanted_leaf in zip(leaves, wanted_leaves, strict=True):
                if np.ndim(wanted_leaf) == 0:  # without rows, such as a capacity
                    assert leaf == wanted_leaf
                    continue
                wanted_leaf = np.asarray(wanted_leaf)[index]
                if np.issubdtype(wanted_leaf.dtype, np.floating):
                    size = max(1, np.max(np.abs(wanted_leaf), initial=0))
                    np.testing.assert_allclose(leaf, wanted_leaf, rtol=0, atol=TOLERANCE * size, err_msg=field.name)
                else:
                    np.testing.assert_array_equal(leaf, wanted_leaf, err_msg=field.name)


def with_penalties(state):
    """The state of three rows, all of whose text is prompt, with PENALTIES from here on."""
    sampling = decoding.Sampling.create(3, VOCABULARY, **PENALTIES)
    history = History.start(state.tokens, state.length, vocab_size=VOCABULARY, with_counts=True)
    return dataclasses.replace(state, sampling=sampling, history=history)


def penalised(logits, prompt, output, row):
    """A row's logits [V] after PENALTIES, in NumPy."""
    for name, values in PENALTIES.items():
        logits = getattr(logits_processors, name)(logits, list(prompt), list(output), values[row])
    return logits


def penalised_drafts(exit_logits, prompts, num_tokens):
    """The draft of each row with PENALTIES on its prompt and its own tokens, [B, C]: the largest logit each time.

    Without the draft's own tokens most drafts would be others, or the test would show nothing.

    exit_logits: maps texts to the drafter's logits after each token, [B, T, V].
    """

    def drafts(counts_own):
        drafted = [[] for _ in prompts]
        for _ in range(num_tokens):
            logits = np.asarray(exit_logits([[*text, *own] for text, own in zip(prompts, drafted, strict=True)]))
            for row, (text, own) in enumerate(zip(prompts, drafted, strict=True)):
                last = np.float64(logits[row, len(text) + len(own) - 1])
                own.append(int(np.argmax(penalised(last, text, own if counts_own else (), row))))
        return np.array(drafted)

    wanted = drafts(True)
    assert np.sum(np.any(wanted != drafts(False), axis=1)) >= 2
    return wanted
