"""The plan of a training run: its learning rate, its moved end, and the values it refuses."""

import pytest

from decodax.decoding.training.plan import Plan


def test_the_learning_rate_rises_stays_and_falls():
    plan = Plan(steps=100, decay_from=64, warmup=10, peak=0.5)
    assert [plan.learning_rate(step) for step in (0, 4, 9, 40, 64)] == [0.05, 0.25, 0.5, 0.5, 0.5]
    assert plan.learning_rate(73) == pytest.approx(0.25)  # a quarter of the way down: 1 - sqrt(1 / 4)
    assert plan.learning_rate(100) == 0.0


def test_a_short_run_warms_up_for_a_tenth_of_it():
    plan = Plan(steps=20, decay_from=13, warmup=100, peak=1.0)
    assert [plan.learning_rate(step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]


def test_a_plan_finishes_earlier_but_not_in_the_past():
    plan = Plan(steps=2000, long_share=0.15).finishing_by(1000, now=700)
    assert (plan.steps, plan.decay_from, plan.long_from) == (1000, 700, 850)
    assert plan.finishing_by(1000, now=700) == plan
    whole = Plan(long_share=0.4).finishing_by(1000)
    assert (whole.decay_from, whole.long_from) == (650, 600)
    with pytest.raises(ValueError, match="after the checkpoint's step 700, got 700"):
        plan.finishing_by(700, now=700)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"optimizer": "sgd"}, "must be muon or adamw, got 'sgd'"),
        ({"window_tokens": 10, "short_tokens": 4}, "multiple of short_tokens, got 10 and 4"),
        ({"long_share": 1.5}, "long_share must be in 0..1, got 1.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"peak": float("nan")}, "learning rate must be positive, got nan"),
    ],
)
def test_meaningless_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Plan(**fields)
