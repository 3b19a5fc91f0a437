"""A report of mismatched weights is short, and shows every kind of problem."""

import doctest

from decodax.models.checkpoints import mismatch_report
from decodax.models.checkpoints.mismatch_report import cut, mismatch_error


def test_examples():
    assert doctest.testmod(mismatch_report).failed == 0


def test_a_short_kind_leaves_its_share_to_the_others():
    lines = [*(f"missing: {i}" for i in range(30)), "odd: x", *(f"surplus: {i}" for i in range(9))]
    assert cut(lines, 100) == lines
    found = cut(lines, 20)
    assert found[:11] == [*lines[:10], "and 20 more missing"] and found[11:] == lines[30:]


def test_long_names_leave_fewer_lines():
    error = str(mismatch_error("folder", [f"{kind}: {i:0200}" for kind in ("missing", "surplus") for i in range(30)]))
    assert len(error) < 3_000 and "missing: 0" in error and "surplus: 0" in error and "more surplus" in error
