"""Every logits processor equals a float64 oracle, row by row and at its edges, and refuses meaningless values."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decodax.decoding.logits_processors as package
from decodax.decoding.logits_processors import METHODS, Batch, History
from decodax.decoding.logits_processors._threshold import cut_threshold
from decodax.decoding.option_values import per_row
from decodax.decoding.top_tokens import argmax_token
from tests.oracles import logits_processors as oracle

ROWS, VOCABULARY, NODES = 5, 13, 3
END_TOKENS = (1, 12)
PROMPTS = [[0, 3, 3], [4], [12, 12, 5, 1, 0], [], [7, 2]]
OUTPUTS = [[3, 8, 8, 8], [], [0], [9, 10, 9], [7, 7, 1, 0, 11]]
# One value per row, the third always off, so that rows with and without the option are in one batch.
VALUES = {
    "repetition_penalty": [1.3, 0.5, 1.0, 4.0, 1.1],
    "presence_penalty": [0.5, -1.5, 0.0, 2.0, 0.1],
    "frequency_penalty": [0.25, 1.5, 0.0, -2.0, 0.7],
    "logit_bias": [{0: -1.5}, {2: -np.inf, 5: 3.0, 12: 0.25}, {}, {11: 100.0}, {4: -100.0, 7: 1.0}],
    "min_new_tokens": [4, 1, 0, 7, 5],
    "temperature": [0.7, 0.0, 1.0, 3.0, 0.1],
    "top_k": [1, 4, 0, 12, 40],
    "top_p": [0.9, 0.3, 1.0, 0.999, 0.05],
    "min_p": [0.1, 0.9, 0.0, 1.0, 0.02],
    "typical_p": [0.9, 0.2, 1.0, 0.6, 0.05],
}


def make_logits(seed, *leading):
    """float32 logits with ties, and with tokens at -inf."""
    generator = np.random.default_rng(seed)
    logits = np.round(generator.normal(0, 2, (*leading, VOCABULARY)) * 4) / 4  # quarters, so that some are equal
    logits[generator.random(logits.shape) < 0.1] = -np.inf
    return logits.astype(np.float32)


def make_history():
    width = max(map(len, PROMPTS))
    tokens = np.array([prompt + [6] * (width - len(prompt)) for prompt in PROMPTS], np.int32)
    lengths = jnp.array([len(prompt) for prompt in PROMPTS])
    history = History.start(jnp.asarray(tokens), lengths, vocab_size=VOCABULARY, with_counts=True)
    for step in range(max(map(len, OUTPUTS))):
        token = np.array([output[step] if step < len(output) else 6 for output in OUTPUTS], np.int32)
        written = jnp.array([int(step < len(output)) for output in OUTPUTS])
        history = history.record(jnp.asarray(token)[:, None], written)
    return history


HISTORY = make_history()


def create(name, option, batch_size=ROWS):
    return METHODS[name].create(option, Batch(batch_size, VOCABULARY, END_TOKENS))


def expected_of(name, row, logits):
    extra = {"end_token_ids": END_TOKENS} if name == "min_new_tokens" else {}
    method = getattr(oracle, name)
    return method(logits.astype(np.float64), PROMPTS[row], OUTPUTS[row], VALUES[name][row], **extra)


def row_of(tree, row):
    """One row of a history or of a processor, which has one array that is the same for all rows."""
    return jax.tree.map(lambda leaf: leaf if leaf.shape == (len(END_TOKENS),) else leaf[row : row + 1], tree)


@jax.jit
def apply(processor, logits, history):
    return processor(logits, history)


def assert_same_distribution(actual, expected):
    """Equal up to a constant per row, which no probability depends on; -inf exactly where expected.

    A processor makes at most about 16 roundings of a float32 no larger than the largest logit before or after it.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    kept = np.isfinite(expected)
    assert kept.any() and np.isfinite(actual[kept]).all()
    scale = max(np.abs(expected[kept]).max(), np.abs(actual[kept]).max(), 1.0)
    actual, expected = actual[kept] - actual[kept].max(), expected[kept] - expected[kept].max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=16 * 2**-24 * scale)


def test_the_catalogue_is_the_folder():
    files = {p.stem for p in Path(package.__file__).parent.glob("*.py") if not p.stem.startswith("_")} - {"contract"}
    assert set(METHODS) == files == set(VALUES)
    for name, method in METHODS.items():
        assert method.__module__.endswith("." + name)
        assert method.__name__ == "".join(word.capitalize() for word in name.split("_"))
    assert [method.__name__ for method in oracle.ORDER] == list(METHODS)


def test_options_that_only_shape_a_draw_leave_every_argmax_and_the_others_do_not():
    """`only_sampling` of each processor is right, on rows without ties."""
    logits = jnp.asarray(
        np.random.default_rng(3).permuted(np.tile(np.arange(VOCABULARY), (ROWS, 1)), axis=1), jnp.float32
    )
    for name, method in METHODS.items():
        if name == "typical_p":  # may cut the most probable token, so greedy rows must not run it
            continue
        moves = [{int(best): -100.0} for best in np.argmax(logits, axis=1)] if name == "logit_bias" else VALUES[name]
        changed = apply(create(name, moves), logits, HISTORY)
        if method.only_sampling:
            np.testing.assert_array_equal(np.argmax(changed, axis=1), np.argmax(logits, axis=1))


@pytest.mark.parametrize("name", METHODS)
def test_values_that_are_off_and_none_leave_no_processor(name):
    for off in (None, *METHODS[name].off):
        if name != "temperature":  # 0 is greedy, which is a processor
            assert create(name, off) is None and create(name, [off] * ROWS) is None
    assert METHODS[name].help.endswith(".") and len(METHODS[name].help) < 100


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_oracle(name):
    processor = create(name, VALUES[name])
    for seed in range(7):
        logits = make_logits(seed, ROWS)
        for changed in (apply(processor, jnp.asarray(logits), HISTORY), processor(jnp.asarray(logits), HISTORY)):
            assert changed.dtype == jnp.float32
            for row in range(ROWS):
                assert_same_distribution(changed[row], expected_of(name, row, logits[row]))


@pytest.mark.parametrize("name", METHODS)
def test_a_row_off_is_untouched_and_a_row_alone_is_the_row_in_a_batch(name):
    processor, logits = create(name, VALUES[name]), make_logits(99, ROWS)
    together = np.asarray(apply(processor, jnp.asarray(logits), HISTORY))
    off = 2
    expected = logits[off] - logits[off].max() if name == "temperature" else logits[off]
    np.testing.assert_array_equal(together[off], expected)
    if name != "temperature":  # the same where the first token holds all the probability that float32 can see
        steep = jnp.asarray(np.tile(np.linspace(0, -600, VOCABULARY, dtype=np.float32), (ROWS, 1)))
        np.testing.assert_array_equal(apply(processor, steep, HISTORY)[off], steep[off])
    for row in range(ROWS):
        alone = apply(row_of(processor, row), jnp.asarray(logits[row : row + 1]), row_of(HISTORY, row))
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("name", METHODS)
def test_many_nodes_of_a_tree_at_once(name):
    processor, logits = create(name, VALUES[name]), jnp.asarray(make_logits(5, ROWS, NODES))
    nodes = jax.jit(jax.vmap(apply, in_axes=(None, 1, None), out_axes=1))(processor, logits, HISTORY)
    for node in range(NODES):
        np.testing.assert_array_equal(nodes[:, node], apply(processor, logits[:, node], HISTORY))


@pytest.mark.parametrize("name", METHODS)
def test_an_option_off_for_all_rows_makes_no_processor(name):
    off = VALUES[name][2]
    for option in (off, [off] * ROWS):
        assert create(name, option) is None
    for option in (None, [None] * ROWS):  # not given: greedy, or off
        assert (create(name, option) is None) == (name != "temperature")
    assert create(name, VALUES[name][0], batch_size=3) is not None
    assert create(name, [off] * (ROWS - 1) + VALUES[name][:1]) is not None


@pytest.mark.parametrize("name", METHODS)
def test_never_forbids_every_token(name):
    extremes = {
        "repetition_penalty": [1e-6, 1e6],
        "presence_penalty": [-1e6, 1e6],
        "frequency_penalty": [-1e6, 1e6],
        "logit_bias": [{token: -np.inf for token in range(VOCABULARY - 1)}, {0: -1e30}],
        "min_new_tokens": [2**31 - 1, 1],
        "temperature": [1e-45, 1e-37, 0.0, 3e38],
        "top_k": [1, VOCABULARY - 1],
        "top_p": [1e-37, 1e-30, 1 - 2**-24],
        "min_p": [1e-37, 1.0],
        "typical_p": [1e-37, 1e-30, 1 - 2**-24],
    }[name]
    logits = np.zeros((ROWS, VOCABULARY), np.float32)  # all equal
    logits[1] = np.linspace(-1e4, 1e4, VOCABULARY)
    logits[2] = np.where(np.arange(VOCABULARY) == VOCABULARY - 2, -300.0, -np.inf)  # only one left
    logits[3] = np.where(np.arange(VOCABULARY) == 6, 1e4, -1e4)
    logits[4] = np.geomspace(1e-38, 30, VOCABULARY)
    if name == "logit_bias":
        logits[2] = -300.0
    for value in extremes:
        changed = np.asarray(apply(create(name, [value] * ROWS), jnp.asarray(logits), HISTORY))
        assert not np.isnan(changed).any() and not np.isposinf(changed).any()
        assert np.isfinite(changed).any(axis=1).all(), (name, value)


def changed_row(name, option, logits, prompt=(), output=()):
    """One row through one processor, with a vocabulary of its own."""
    processor = METHODS[name].create(option, Batch(1, len(logits), end_token_ids=(0,)))
    history = History.start(
        jnp.array([list(prompt)], jnp.int32).reshape(1, -1),
        jnp.array([len(prompt)]),
        vocab_size=len(logits),
        with_counts=True,
    )
    for token in output:
        history = history.record(jnp.array([[token]]), jnp.array([1]))
    return np.asarray(processor(jnp.array([logits], jnp.float32), history))[0]


def kept(name, option, probability):
    return np.flatnonzero(np.isfinite(changed_row(name, option, np.log(probability)))).tolist()


def test_the_numbers_in_the_docstrings():
    inf = np.inf
    np.testing.assert_allclose(changed_row("repetition_penalty", 2, [4, -3, 1], prompt=[0], output=[1]), [2, -6, 1])
    np.testing.assert_allclose(changed_row("presence_penalty", 0.5, [4, 3, 1], [0], [1, 2, 2, 2]), [4, 2.5, 0.5])
    np.testing.assert_allclose(changed_row("frequency_penalty", 0.5, [4, 3, 1], [0], [1, 2, 2, 2]), [4, 2.5, -0.5])
    np.testing.assert_allclose(changed_row("logit_bias", {0: -1.5, 2: -inf}, [4, 3, 1]), [2.5, 3, -inf])
    for output, first in (([], -inf), ([1], -inf), ([1, 2], 4)):
        np.testing.assert_allclose(changed_row("min_new_tokens", 2, [4, 3, 1], output=output), [first, 3, 1])
    np.testing.assert_allclose(changed_row("temperature", 0.5, [4, 3, 1]), [0, -2, -6])
    np.testing.assert_allclose(changed_row("top_k", 2, [4, 3, 3, 1]), [4, 3, 3, -inf])
    assert kept("top_p", 0.7, [0.5, 0.3, 0.2]) == [0, 1]
    assert kept("top_p", 0.5, [0.5, 0.3, 0.2]) == [0]
    assert kept("min_p", 0.5, [0.5, 0.3, 0.2]) == [0, 1]
    assert kept("typical_p", 0.3, [0.5, 0.3, 0.2]) == [1]
    assert kept("typical_p", 0.8, [0.5, 0.3, 0.2]) == [0, 1]


def test_ties():
    quarters = [0.125, 0.25, 0.125, 0.25, 0.25]
    np.testing.assert_array_equal(changed_row("temperature", [0], [1, 3, 3, 2]), [-np.inf, 0, -np.inf, -np.inf])
    assert kept("top_k", 1, quarters) == [1, 3, 4]
    assert kept("top_k", 4, quarters) == [0, 1, 2, 3, 4]
    assert kept("top_p", 0.3, quarters) == [1, 3, 4]
    assert kept("typical_p", 0.1, quarters) == [1, 3, 4]  # 0.25 is closer to the entropy, 2.25 bits, than 0.125
    assert kept("min_p", 1.0, quarters) == [1, 3, 4]


def test_threshold_of_a_large_row():
    generator = np.random.default_rng(0)
    size = 1009
    score = generator.normal(0, 10, (5, size))
    score[1] = np.round(score[1])  # many equal
    score[2] = generator.choice([-0.0, 0.0, 1e-20, -1e-20, 3e38, -3e38, -np.inf], size)
    score[3] = -1 - generator.permutation(size) * 2.0**-23  # neighbouring floats
    score[4] = np.exp(score[4] - 40)  # tiny, but normal: what is not counts as 0
    score = score.astype(np.float32)
    weight = generator.integers(0, 8, (5, size)).astype(np.float32)  # whole, so that every sum is exact
    find = jax.jit(cut_threshold)
    for fraction in (1e-9, 0.01, 0.5, 0.99, 1.0):
        target = np.float32(fraction * weight.sum(axis=1))
        threshold = np.asarray(find(jnp.asarray(score), jnp.asarray(weight), jnp.asarray(target)))
        for row in range(5):
            expected = oracle.best_set(score[row], weight[row], target[row])
            np.testing.assert_array_equal(score[row] >= threshold[row], expected)
    out_of_reach = jnp.asarray(weight.sum(axis=1) + 1)
    assert np.isneginf(find(jnp.asarray(score), jnp.asarray(weight), out_of_reach)).all()


def test_threshold_between_any_two_neighbouring_floats():
    """The mean of two bounds is exact, whatever their last bits are."""
    count = 400
    score = (-1 - np.arange(count) * 2.0**-23).astype(np.float32)  # consecutive, the largest first
    target = np.arange(1, count + 1, dtype=np.float32)
    rows = jnp.broadcast_to(jnp.asarray(score), (count, count))
    threshold = jax.jit(cut_threshold)(rows, jnp.ones_like(rows), jnp.asarray(target))
    np.testing.assert_array_equal(threshold, score)


def test_nucleus_of_a_large_vocabulary():
    generator = np.random.default_rng(1)
    logits = generator.normal(0, 3, (3, 10_007)).astype(np.float32)
    top_p = [0.5, 0.9, 0.99]
    processor = METHODS["top_p"].create(top_p, Batch(3, VOCABULARY))
    changed = np.asarray(processor(jnp.asarray(logits), History(None, None, jnp.zeros(3, jnp.int32))))
    for row in range(3):
        probability = oracle.softmax(logits[row].astype(np.float64))
        nucleus = np.isfinite(changed[row])
        # 10,007 float32 terms: their pairwise sum is good to log2(10,007) = 14 roundings.
        slack = 14 * 2**-24
        assert probability[nucleus].sum() >= top_p[row] - slack
        assert probability[nucleus].sum() - probability[nucleus].min() < top_p[row] + slack
        assert probability[nucleus].min() > probability[~nucleus].max()


def test_largest_token_is_argmax():
    logits = make_logits(3, 101)
    logits[7], logits[8] = 0.0, np.where(np.arange(VOCABULARY) < 9, -np.inf, -5.0)
    logits[9, [4, 11]] = 50.0
    np.testing.assert_array_equal(jax.jit(argmax_token)(jnp.asarray(logits)), np.argmax(logits, axis=1))


def test_history_counts_prompt_and_output():
    for counts, texts in ((HISTORY.prompt_counts, PROMPTS), (HISTORY.output_counts, OUTPUTS)):
        expected = [[text.count(token) for token in range(VOCABULARY)] for text in texts]
        np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(HISTORY.num_new_tokens, [len(output) for output in OUTPUTS])


def test_history_without_counts_raises_where_counts_are_needed():
    tokens, length = jnp.zeros((ROWS, 2), jnp.int32), jnp.full(ROWS, 2)
    history = History.start(tokens, length, vocab_size=VOCABULARY, with_counts=False)
    history = history.record(jnp.zeros((ROWS, 1), jnp.int32), (jnp.arange(ROWS) < 3).astype(jnp.int32))
    assert history.prompt_counts is None and history.output_counts is None
    np.testing.assert_array_equal(history.num_new_tokens, [1, 1, 1, 0, 0])
    logits = jnp.asarray(make_logits(0, ROWS))
    for name, method in METHODS.items():
        if method.needs_counts:
            with pytest.raises(ValueError, match=r"history holds none.*with_counts=sampling\.needs_counts"):
                create(name, VALUES[name])(logits, history)
        else:
            create(name, VALUES[name])(logits, history)


def test_processors_are_frozen():
    for name in METHODS:
        processor = create(name, VALUES[name])
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(processor, dataclasses.fields(processor)[0].name, None)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("temperature", -0.5, r"temperature must be a finite number, 0 or more .*, got -0\.5$"),
        ("temperature", NAN, r"temperature must be .*, got nan$"),
        ("temperature", [1.0, 1.0, INF, 1.0, 1.0], r"temperature must be .*, got inf in row 2$"),
        ("temperature", 1e39, r"temperature must be .*, got 1e\+39$"),  # infinite in float32
        ("temperature", 10**400, r"temperature must be .*, got 10+\.\.\.0+$"),  # beyond any float
        ("min_p", -(10**400), r"min_p must be in 0\.\.1 \(0: off\), got -10+\.\.\.0+$"),
        ("top_p", {0.5}, r"top_p must be above 0 and at most 1 \(1: off\), got \{0\.5\}$"),  # rows have an order
        ("top_k", -(2**40), r"top_k must be a whole number.*, got -1099511627776$"),
        ("temperature", [0.5, 0.5], r"temperature must be one number, or one per row \(5 rows\), got 2 numbers"),
        ("temperature", np.ones(6), r"temperature must be one number, or one per row \(5 rows\), got 6 numbers"),
        ("top_k", -2, r"top_k must be a whole number, 1 or more \(0, -1 or None: off\), got -2$"),
        ("top_k", 2.5, r"top_k must be a whole number.*, got 2\.5$"),
        ("top_k", NAN, r"top_k must be a whole number.*, got nan$"),
        ("top_k", [3, 3, 3, 3, INF], r"top_k must be a whole number.*, got inf in row 4$"),
        ("top_p", 0.0, r"top_p must be above 0 and at most 1 \(1: off\), got 0\.0$"),
        ("top_p", 1e-40, r"top_p must be above 0 and at most 1 \(1: off\), got 1e-40$"),  # not normal in float32
        ("top_p", 1.5, r"top_p must be .*, got 1\.5$"),
        ("top_p", NAN, r"top_p must be .*, got nan$"),
        ("min_p", -0.1, r"min_p must be in 0\.\.1 \(0: off\), got -0\.1$"),
        ("min_p", 1.1, r"min_p must be .*, got 1\.1$"),
        ("min_p", NAN, r"min_p must be .*, got nan$"),
        ("typical_p", 0, r"typical_p must be above 0 and at most 1 \(1: off\), got 0$"),
        ("typical_p", 2.0, r"typical_p must be .*, got 2\.0$"),
        ("repetition_penalty", 0.0, r"repetition_penalty must be a finite number above 0 \(1: off\), got 0\.0$"),
        ("repetition_penalty", -1.0, r"repetition_penalty must be .*, got -1\.0$"),
        ("repetition_penalty", INF, r"repetition_penalty must be .*, got inf$"),
        ("presence_penalty", NAN, r"presence_penalty must be a finite number \(0: off\), got nan$"),
        ("frequency_penalty", -INF, r"frequency_penalty must be a finite number \(0: off\), got -inf$"),
        ("min_new_tokens", -1, r"min_new_tokens must be a whole number, 0 or more, got -1$"),
        ("logit_bias", {13: 1.0}, r"token ids must be in 0\.\.12 \(vocabulary\), got 13$"),
        ("logit_bias", [{}, {-1: 1.0}, {}, {}, {}], r"token ids must be in 0\.\.12 \(vocabulary\), got -1 in row 1$"),
        ("logit_bias", {"3": 1.0}, r"token ids must be in 0\.\.12 \(vocabulary\), got '3'$"),
        ("logit_bias", {True: 1.0}, r"token ids must be in 0\.\.12 \(vocabulary\), got True$"),
        ("logit_bias", {3: "x"}, r"a bias must be a finite number or -inf, got 'x' for token 3$"),
        ("logit_bias", {3: 10**400}, r"a bias must be a finite number or -inf, got 10+\.\.\.0+ for token 3$"),
        ("logit_bias", 5, r"logit_bias must be a mapping from token ids to numbers, got 5$"),
        ("logit_bias", [None, 1, {}, {}, {}], r"logit_bias must be a mapping from token ids .*, got 1 in row 1$"),
        ("logit_bias", {3: NAN}, r"a bias must be a finite number or -inf, got nan for token 3$"),
        ("logit_bias", {3: INF}, r"a bias must be a finite number or -inf, got inf for token 3$"),
        ("logit_bias", [{1: 1.0}], r"logit_bias must be one mapping, or one per row \(5 rows\), got 1$"),
    ],
)
def test_refuses_meaningless_values(name, option, message):
    with pytest.raises(ValueError, match=message):
        create(name, option)


@pytest.mark.parametrize("option", ["hot", True, np.True_, [0.5, "x", 0.5], {"a": 1}, [[1.0], [1.0], [1.0]], 1j])
def test_refuses_values_that_are_not_numbers(option):
    with pytest.raises(ValueError, match=r"heat must be a number, got"):
        per_row("heat", option, batch_size=3, neutral=1.0, is_valid=np.isfinite, expected="a number")


@pytest.mark.parametrize("token", [13, -1])
def test_refuses_end_tokens_outside_the_vocabulary(token):
    with pytest.raises(
        ValueError, match=rf"end_token_ids must be token ids in 0\.\.12 \(the vocabulary\), got {token}"
    ):
        METHODS["min_new_tokens"].create(0, Batch(ROWS, VOCABULARY, [1, token]))


def test_a_temperature_that_is_not_given_is_greedy():
    np.testing.assert_array_equal(create("temperature", [None, 0.5, 1, None, 2]).temperature, [0, 0.5, 1, 0, 2])


def test_a_whole_number_beyond_any_size_is_the_largest_of_its_kind():
    for huge in (2**31, 2**40, 1e12, 10**400, np.uint64(2**63)):
        assert create("top_k", huge) is None  # as many as there are, so nothing is cut
        np.testing.assert_array_equal(create("min_new_tokens", huge).min_new_tokens, [2**31 - 1] * ROWS)


def test_reads_numbers_of_every_kind():
    expected = np.array([0.5, 2.0, 3.0], np.float32)
    read = {"batch_size": 3, "neutral": 3.0, "is_valid": np.isfinite, "expected": "a number"}
    for option in (
        (0.5, 2, None),
        [np.float32(0.5), np.int64(2), 3.0],
        [jnp.bfloat16(0.5), jnp.int32(2), np.array(3)],
        iter([0.5, 2, 3]),
        np.array([0.5, 2, 3]),
        jnp.array([0.5, 2, 3], jnp.float16),
        np.ma.masked_equal([0.5, 2.0, 9.0], 9.0),
    ):
        np.testing.assert_array_equal(per_row("heat", option, **read), expected)
    for option in (2, 2.0, np.float64(2), np.int32(2), jnp.float32(2), np.array(2)):
        rows = per_row("heat", option, **read)
        assert rows.dtype == np.float32 and rows.tolist() == [2, 2, 2]
        rows = per_row("heat", option, **read, whole=True)
        assert rows.dtype == np.int32 and rows.tolist() == [2, 2, 2]


def test_a_few_more_biases_do_not_change_shapes():
    three, four, five = ({token: 1.0 for token in range(count)} for count in (3, 4, 5))
    assert create("logit_bias", three).tokens.shape == create("logit_bias", four).tokens.shape == (ROWS, 4)
    assert create("logit_bias", five).tokens.shape == (ROWS, 8)
