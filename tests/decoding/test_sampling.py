"""Tokens are drawn from the distribution that the options define, row by row, in any batch, without recompiling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from decodax.decoding.logits_processors import METHODS, History
from decodax.decoding.sampling import Sampling, choose, processed, processed_logits, token_logprob
from tests.oracles.logits_processors import probs

VOCABULARY = 11
END_TOKENS = (1, 8)
PROMPT, OUTPUT = [0, 3, 3, 5], [3, 2, 2]
# One row each: every option alone, some together, greedy with and without. Options left out are off.
CASES = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cool": {"temperature": 0.6},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.75},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.6},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "presence_penalty": {"presence_penalty": 0.9},
    "frequency_penalty": {"frequency_penalty": 0.6},
    "logit_bias": {"logit_bias": {0: 1.5, 4: -np.inf, 6: -0.5}},
    "min_new_tokens": {"min_new_tokens": 4},
    "min_new_tokens reached": {"min_new_tokens": 3},
    "usual": {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "repetition_penalty": 1.2},
    "all": {
        "temperature": 1.7,
        "top_k": 8,
        "top_p": 0.95,
        "min_p": 0.05,
        "typical_p": 0.9,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "logit_bias": {7: 1.0},
        "min_new_tokens": 9,
    },
    "greedy, all the same": {
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.3,
        "min_p": 0.9,
        "typical_p": 0.2,
        "repetition_penalty": 3.0,
        "logit_bias": {9: 0.75},
    },
}
NUM_CASES = len(CASES)
OFF = {"temperature": 1.0}


def make_logits(num_rows, seed=0):
    return np.random.default_rng(seed).normal(0, 1.5, (num_rows, VOCABULARY)).astype(np.float32)


def create(cases, **more):
    """One pipeline for these rows, each with its own options."""
    names = sorted({name for case in cases for name in case} | {"temperature"})
    options = {name: [case.get(name, OFF.get(name)) for case in cases] for name in names}
    return Sampling.create(len(cases), VOCABULARY, end_token_ids=END_TOKENS, **options, **more)


def make_history(num_rows):
    prompt = jnp.asarray(np.tile(np.array(PROMPT, np.int32), (num_rows, 1)))
    history = History.start(prompt, jnp.full(num_rows, len(PROMPT)), vocab_size=VOCABULARY, with_counts=True)
    for token in OUTPUT:
        history = history.record(jnp.full((num_rows, 1), token), jnp.ones(num_rows, jnp.int32))
    return history


def expected_distribution(logits, case):
    return probs(logits, PROMPT, OUTPUT, end_token_ids=END_TOKENS, **case)


LOGITS = make_logits(NUM_CASES)
SEED = np.arange(NUM_CASES, dtype=np.uint32) + 3
POSITION = np.full(NUM_CASES, len(PROMPT) + len(OUTPUT), np.int32)
jit_choose = jax.jit(choose)
jit_processed = jax.jit(processed)


def same_seed_and_position(count):
    return jnp.asarray(SEED[:count]), jnp.asarray(POSITION[:count])


def assert_distribution(log_probability, expected):
    """Probabilities to 1e-5: a logit below 10 in float32 is good to 6e-7, over a temperature of 0.6 and a few steps."""
    assert log_probability.dtype == jnp.float32
    probability = np.exp(np.asarray(log_probability, np.float64))
    np.testing.assert_array_equal(probability == 0, expected == 0)
    np.testing.assert_allclose(probability, expected, rtol=1e-5)


def test_the_distribution_of_rows_with_different_options_in_one_batch():
    sampling = create(list(CASES.values()))
    assert len(sampling.processors) == len(METHODS) and sampling.do_sample and sampling.needs_counts
    logits, history = jnp.asarray(LOGITS), make_history(NUM_CASES)
    for log_probability in (jit_processed(sampling, logits, history), processed(sampling, logits, history)):
        for row, case in enumerate(CASES.values()):
            assert_distribution(log_probability[row], expected_distribution(LOGITS[row], case))


@pytest.mark.parametrize("name", CASES)
def test_the_distribution_of_a_row_alone(name):
    sampling, logits = create([CASES[name]]), make_logits(1, seed=5)
    assert sampling.do_sample == (CASES[name].get("temperature") != 0)
    log_probability = jit_processed(sampling, jnp.asarray(logits), make_history(1))
    assert_distribution(log_probability[0], expected_distribution(logits[0], CASES[name]))


def test_draws_follow_the_distribution_over_positions_and_over_seeds():
    count = 20_011
    sampling, logits, history = create(list(CASES.values())), jnp.asarray(LOGITS), make_history(NUM_CASES)
    draw = jax.jit(jax.vmap(choose, in_axes=(None, None, None, 1, 1), out_axes=1))
    fixed, moving = np.tile(SEED[:, None], (1, count)), np.tile(np.arange(count), (NUM_CASES, 1))
    over_positions = draw(sampling, logits, history, jnp.asarray(fixed), jnp.asarray(moving, jnp.int32))
    over_seeds = draw(sampling, logits, history, jnp.asarray(moving, jnp.uint32), jnp.asarray(fixed, jnp.int32))
    for tokens in (np.asarray(over_positions), np.asarray(over_seeds)):
        for row, (name, case) in enumerate(CASES.items()):
            expected = expected_distribution(LOGITS[row], case) * count
            counts = np.bincount(tokens[row], minlength=VOCABULARY)
            possible = expected > 0
            assert counts[~possible].sum() == 0, name
            # The seeds are fixed, so this passes always or never; 34 tests at 1e-4 fail by chance once in 300.
            assert possible.sum() == 1 or scipy.stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-4, (
                name
            )
    # Neighbouring positions of one row, and two rows at one position, are independent.
    plain, hot = np.asarray(over_positions)[[0, 3]]
    for one, other in ((plain[:-1], plain[1:]), (plain, hot)):
        pairs = np.bincount(one * VOCABULARY + other, minlength=VOCABULARY**2).reshape(VOCABULARY, VOCABULARY)
        assert scipy.stats.chi2_contingency(pairs).pvalue > 1e-4


def test_a_row_draws_the_same_alone_and_in_a_batch():
    rows = [name for name in CASES if name != "all"][::4]
    cases = [CASES[name] for name in rows]
    logits = np.tile(make_logits(1, seed=2), (len(rows), 1))
    seed, position = np.arange(len(rows)).astype(np.uint32), np.arange(len(rows)).astype(np.int32) + 9
    batch, history = create(cases), make_history(len(rows))
    tokens = jit_choose(batch, jnp.asarray(logits), history, jnp.asarray(seed), jnp.asarray(position))
    distributions = np.asarray(jit_processed(batch, jnp.asarray(logits), history))
    for row, case in enumerate(cases):
        one = slice(row, row + 1)
        arguments = (jnp.asarray(logits[one]), make_history(1))
        draw = (jnp.asarray(seed[one]), jnp.asarray(position[one]))
        # With its own options only, and through the pipeline of the batch with the neighbours' options off.
        assert jit_choose(create([case]), *arguments, *draw)[0] == tokens[row]
        same = jax.tree.map(lambda leaf, one=one: leaf if leaf.shape == (len(END_TOKENS),) else leaf[one], batch)
        assert jit_choose(same, *arguments, *draw)[0] == tokens[row]
        np.testing.assert_array_equal(jit_processed(same, *arguments)[0], distributions[row])


def test_eager_and_jitted_choose_the_same():
    sampling, logits, history = create(list(CASES.values())), jnp.asarray(LOGITS), make_history(NUM_CASES)
    draw = same_seed_and_position(NUM_CASES)
    np.testing.assert_array_equal(
        choose(sampling, logits, history, *draw), jit_choose(sampling, logits, history, *draw)
    )


def test_greedy_is_the_largest_penalised_logit_whatever_the_neighbours_do():
    penalties = {"repetition_penalty": 3.0, "frequency_penalty": 0.4, "logit_bias": {9: 0.75, 10: -np.inf}}
    cuts = {"top_k": 2, "top_p": 0.2, "min_p": 0.9, "typical_p": 0.1}
    greedy = {"temperature": 0.0, **penalties}
    logits = make_logits(3, seed=11)
    logits[2] = np.float32(1.5)  # all tied
    logits[2, [0, 2, 3, 5]] = -4.0  # and tokens of prompt and output lower
    history, draw = make_history(3), same_seed_and_position(3)
    expected = []
    for row in range(3):
        probability = expected_distribution(logits[row], greedy)
        assert probability.max() == 1.0
        expected.append(np.argmax(probability))
    assert expected[2] == 9  # the bias; without it the lowest id of the tie, below
    for cases in ([greedy] * 3, [greedy | cuts] * 3, [greedy, greedy | cuts, greedy]):
        assert not create(cases).do_sample
        np.testing.assert_array_equal(jit_choose(create(cases), jnp.asarray(logits), history, *draw), expected)
    for row in range(3):
        cases = [cuts | penalties | {"temperature": 5.0}] * 3
        cases[row] = greedy | cuts
        assert jit_choose(create(cases), jnp.asarray(logits), history, *draw)[row] == expected[row]
    for case in ({"temperature": 0.0}, {"temperature": 0.0, "top_k": 4}):
        assert choose(create([case] * 3), jnp.asarray(logits), history, *draw)[2] == 1


def test_values_do_not_recompile_and_options_do():
    traces = []

    @jax.jit
    def counted(sampling, logits, history, seed, position):
        traces.append(len(sampling.processors))
        return choose(sampling, logits, history, seed, position)

    def call(seed=0, position=7, **options):
        sampling = Sampling.create(1, VOCABULARY, end_token_ids=END_TOKENS, **options)
        draw = jnp.array([seed], jnp.uint32), jnp.array([position], jnp.int32)
        return counted(sampling, jnp.asarray(LOGITS[:1]), make_history(1), *draw)

    call(**CASES["all"])
    changed = {name: value * 0.9 for name, value in CASES["all"].items() if isinstance(value, float)}
    call(**CASES["all"] | changed | {"top_k": 3, "logit_bias": {2: -1.0}, "min_new_tokens": 2})
    call(seed=5, position=8, **CASES["all"])
    call(**CASES["all"] | {"top_k": [10], "min_p": np.float64(0.5)})
    assert traces == [len(METHODS)]
    # Another option of the same shape must not reuse the code of the first.
    for step, name in enumerate(("top_p", "min_p", "typical_p"), start=2):
        call(temperature=1.0, **{name: 0.5})
        call(temperature=1.0, **{name: 0.3})
        assert len(traces) == step
    call(temperature=0.0, top_p=0.5)
    call()
    assert traces[4:] == [0]


def test_greedy_compiles_no_random_numbers_and_nothing_sorts():
    def code(**options):
        sampling = Sampling.create(1, VOCABULARY, end_token_ids=END_TOKENS, **options)
        draw = same_seed_and_position(1)
        return str(jax.make_jaxpr(choose)(sampling, jnp.asarray(LOGITS[:1]), make_history(1), *draw))

    assert "random" not in code(repetition_penalty=1.5, top_p=0.5)
    everything = code(**CASES["all"])
    assert "random" in everything and " sort[" not in everything and " top_k[" not in everything


def test_options_that_are_off_leave_no_processor():
    def active(**options):
        return [type(processor).__name__ for processor in Sampling.create(2, VOCABULARY, **options).processors]

    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}, "min_new_tokens": 0}
    for temperature in (0.0, 1.0, [1.0, 1.0]):
        assert active(temperature=temperature, **neutral) == active(temperature=temperature) == []
    assert active(temperature=[0.0, 1.0]) == ["Temperature"]
    assert active(top_k=3, top_p=0.5, min_p=0.1, typical_p=0.5) == []  # greedy, by default
    assert active(min_new_tokens=3) == []  # without end tokens there is nothing to forbid
    assert active(min_new_tokens=3, end_token_ids=[2]) == ["MinNewTokens"]
    assert not Sampling.create(2, VOCABULARY).do_sample and Sampling.create(2, VOCABULARY, temperature=[0, 1]).do_sample
    assert not Sampling.create(2, VOCABULARY, logit_bias={1: 1.0}, top_p=0.5).needs_counts
    assert Sampling.create(2, VOCABULARY, presence_penalty=0.5).needs_counts
    everything = Sampling.create(2, VOCABULARY, end_token_ids=END_TOKENS, **CASES["all"])
    assert tuple(type(processor) for processor in everything.processors) == tuple(METHODS.values())


def test_half_precision_logits_are_read_as_float32():
    history, half = make_history(NUM_CASES), jnp.asarray(LOGITS, jnp.bfloat16)
    for sampling in (create(list(CASES.values())), Sampling.create(NUM_CASES, VOCABULARY, temperature=1.0)):
        for function in (jit_processed, jax.jit(processed_logits)):
            from_half = function(sampling, half, history)
            assert from_half.dtype == jnp.float32
            np.testing.assert_array_equal(from_half, function(sampling, half.astype(jnp.float32), history))


@pytest.mark.parametrize("leading", [(5,), (2, 3), ()])
def test_token_logprob_is_under_the_models_own_distribution(leading):
    generator = np.random.default_rng(4)
    logits = generator.normal(0, 20, (*leading, VOCABULARY)).astype(np.float32) + 300
    token = generator.integers(0, VOCABULARY, leading).astype(np.int32)
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(log_probability, token[..., None], axis=-1)[..., 0]
    # Two numbers near 350, rounded to float32.
    actual = jax.jit(token_logprob)(jnp.asarray(logits), jnp.asarray(token))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3 * 350 * 2**-24)
    half = token_logprob(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(token))
    assert half.dtype == jnp.float32


def test_refuses_to_forbid_every_token():
    all_but_ends = {token: -np.inf for token in range(VOCABULARY) if token not in END_TOKENS}
    everything = {token: -np.inf for token in range(VOCABULARY)}
    message = r"must leave a token to choose, but forbid all 11 in row "
    with pytest.raises(ValueError, match=message + "0"):
        Sampling.create(2, VOCABULARY, logit_bias=everything)
    with pytest.raises(ValueError, match=message + "1"):
        Sampling.create(2, VOCABULARY, logit_bias=[None, everything])
    with pytest.raises(ValueError, match=message + "1"):
        Sampling.create(3, VOCABULARY, logit_bias=all_but_ends, min_new_tokens=[0, 1, 0], end_token_ids=END_TOKENS)
    with pytest.raises(ValueError, match=message + "0"):
        Sampling.create(1, VOCABULARY, min_new_tokens=1, end_token_ids=range(VOCABULARY))
    Sampling.create(2, VOCABULARY, logit_bias=all_but_ends, end_token_ids=END_TOKENS)
    Sampling.create(2, VOCABULARY, logit_bias=dict(list(everything.items())[1:]))


def test_refuses_bad_and_unknown_options():
    with pytest.raises(ValueError, match=r"temperature must be .*, got -1\.0"):
        Sampling.create(2, VOCABULARY, temperature=-1.0)
    with pytest.raises(ValueError, match=r"top_p must be .*, got 1\.5 in row 1"):
        Sampling.create(2, VOCABULARY, top_p=[0.5, 1.5])  # checked although greedy would not use it
    with pytest.raises(ValueError, match=r"top_k must be one number, or one per row \(2 rows\), got 3 numbers"):
        Sampling.create(2, VOCABULARY, top_k=[1, 2, 3])
    with pytest.raises(TypeError, match="topp"):
        Sampling.create(2, VOCABULARY, topp=0.5)
