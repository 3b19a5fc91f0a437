"""Damage of every kind ends in a clear message, or loads the right model; the counts are printed.

The quick tests run some hundred cases in this process, chosen so that every kind of damage is among them; the slow
ones run all cases in processes of their own, with those that may end or block a process.
"""

import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from tests.fuzz.isolated import judge_isolated
from tests.fuzz.subjects import SUBJECTS
from tests.fuzz.verdict import Case, Report, judge_all

# How many of each subject's cases run quickly: about a second's worth.
_QUICK = dict.fromkeys(SUBJECTS, 60) | {"config": 90, "auxiliary_weights": 50, "tokenizer": 70, "options": 45}


def _sample(cases: list[Case], count: int) -> list[Case]:
    """`count` cases, the same ones every time, of all kinds of damage in turn."""
    kinds = defaultdict(list)
    for index in np.random.default_rng(0).permutation(len(cases)):
        case = cases[index]
        kinds[re.split(r"[:/]", case.name.split("/", 2)[2])[0]].append(case)
    turns = [case for turn in range(count) for kind in kinds.values() for case in kind[turn : turn + 1]]
    return turns[:count]


def _check(subject: str, report: Report, record_property: Callable[[str, object], None]) -> None:
    record_property("fuzz", f"{subject}: {report.summary()}")
    assert not report.wrong, report.failures()
    assert report.counts["right"] and report.counts["refused"], report.summary()


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.quick_cases(4)
def test_some_damage(subject, tmp_path, record_property):
    cases = [case for case in SUBJECTS[subject].cases(tmp_path) if not case.may_kill and _is_quick(case)]
    report = judge_all(_sample(cases, _QUICK[subject]))
    assert len(report.verdicts) == _QUICK[subject]
    _check(subject, report, record_property)


def _is_quick(case: Case) -> bool:
    """Right options compile a program each."""
    return not case.name.startswith(("options/llama/right", "options/llama/mixed"))


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_all_damage(subject, tmp_path, record_property):
    names = [case.name for case in SUBJECTS[subject].cases(tmp_path)]
    assert len(names) == len(set(names)), "a name stands for two cases"
    report = judge_isolated(subject, names)
    assert [verdict.name for verdict in report.verdicts] == names
    _check(subject, report, record_property)
