"""A report of what does not fit is short, and shows every kind of problem."""

import doctest

from decodax.models import misfit_report
from decodax.models.misfit_report import cut


def test_examples():
    assert doctest.testmod(misfit_report).failed == 0


def test_a_short_kind_leaves_its_share_to_the_others():
    lines = [*(f"missing: {i}" for i in range(30)), "odd: x", *(f"surplus: {i}" for i in range(9))]
    assert cut(lines, 100) == lines
    found = cut(lines, 20)
    assert found[:11] == [*lines[:10], "and 20 more missing"] and found[11:] == lines[30:]
