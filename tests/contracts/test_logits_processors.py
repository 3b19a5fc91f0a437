"""Every logits processor keeps the contract: it reads what it says it reads, row by row, and gives logits.

What each computes is in `tests/decoding/test_logits_processors.py`, against NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.core.axes import declared_axes
from decodax.decoding.logits_processors import METHODS as OURS
from decodax.decoding.logits_processors import Batch, History, LogitsProcessor
from tests.contracts.examples import logits_processors
from tests.contracts.lookup import examples_of
from tests.contracts.outside import with_outside

METHODS = with_outside(OURS, "logits_processors")
EXAMPLES = examples_of(logits_processors, METHODS)
ROWS, VOCABULARY = 3, 13
BATCH = Batch(ROWS, VOCABULARY, (1, 12))
TEXT = np.array([[3, 3, 8, 8, 0, 0], [7, 1, 7, 5, 7, 0], [9, 0, 0, 0, 0, 0]], np.int32)
WRITTEN = np.array([4, 5, 1])
each_example = pytest.mark.parametrize("name", EXAMPLES)


def history(text=TEXT, written=WRITTEN):
    """Rows whose first token is the prompt, with all that a history can hold."""
    kept = {"vocab_size": VOCABULARY, "with_counts": True, "with_tokens": True}
    begun = History.start(jnp.asarray(text), jnp.ones(ROWS, jnp.int32), **kept)
    return begun.record(jnp.asarray(text[:, 1:]), jnp.asarray(written - 1))


def logits():
    """Normal numbers, some of them -inf, without ties."""
    random = np.random.default_rng(3)
    numbers = random.normal(0, 2, (ROWS, VOCABULARY)).astype(np.float32)
    return jnp.asarray(np.where(random.random(numbers.shape) < 0.2, -np.inf, numbers).astype(np.float32))


def processor(name, option=None):
    return METHODS[name].create(EXAMPLES[name] if option is None else option, BATCH)


@jax.jit
def apply(processor, logits, history):
    return processor(logits, history)


@each_example
def test_logits_come_out_as_such(name):
    """One finite logit a row at least, no NaN; and a forbidden token stays forbidden."""
    own = processor(name)
    assert type(own) is METHODS[name] and isinstance(own, LogitsProcessor)
    got = apply(own, logits(), history())
    assert got.dtype == jnp.float32 and got.shape == (ROWS, VOCABULARY)
    assert not np.isnan(got).any() and not np.isposinf(got).any() and np.isfinite(got).any(axis=1).all()
    assert np.isneginf(np.asarray(got)[np.isneginf(logits())]).all()
    assert np.any(np.asarray(got) != logits())


@each_example
def test_it_reads_what_it_says_it_reads(name):
    """Without what it does not need it gives the same, and with another text other logits where it needs the text."""
    own, whole = processor(name), history()
    counts = (whole.prompt_counts, whole.output_counts) if own.needs_counts else (None, None)
    tokens = (whole.tokens, whole.length) if own.needs_tokens else (None, None)
    got, want = apply(own, logits(), History(*counts, whole.num_new_tokens, *tokens)), apply(own, logits(), whole)
    np.testing.assert_array_equal(got, want)
    other = apply(own, logits(), history((TEXT + 3) % VOCABULARY))
    assert np.any(np.asarray(other) != want) == (own.needs_counts or own.needs_tokens)


@each_example
def test_a_row_is_found_by_the_axes_that_its_arrays_name(name):
    """On a mesh, and where rows move; and a row alone is the row in the batch."""
    own, whole = processor(name), history()
    leaves, structure = jax.tree.flatten(own)
    axes = declared_axes(own)
    assert [len(names or ()) for names in axes] == [leaf.ndim for leaf in leaves]
    together = np.asarray(apply(own, logits(), whole))
    for row in range(ROWS):
        part = [leaf[row : row + 1] if names[:1] == ("B",) else leaf for leaf, names in zip(leaves, axes, strict=True)]
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], (logits(), whole))
        np.testing.assert_array_equal(apply(jax.tree.unflatten(structure, part), *alone)[0], together[row])


@each_example
def test_other_values_compile_nothing(name):
    """They are arrays of the same shapes; an option that is off for all rows makes no processor."""
    types = lambda own: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(own)]
    own, other = processor(name), processor(name, EXAMPLES[name][::-1])
    assert jax.tree.structure(own) == jax.tree.structure(other) and types(own) == types(other)
    assert any(np.any(one != two) for one, two in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True))
    assert name == "temperature" or all(METHODS[name].create(off, BATCH) is None for off in (None, *own.off))
