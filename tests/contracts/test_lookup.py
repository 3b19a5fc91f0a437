"""A method without an example is reported where its tests fail, and an example without a method at once."""

from types import ModuleType

import pytest

from tests.contracts.lookup import examples_of

METHODS = {"first": int, "second": str, "third": float}


def examples(**functions):
    """A file of examples with these functions, one helper, and a class and a function that it imports."""
    module = ModuleType("tests.contracts.examples.folder")
    for name, returned in {**functions, "_helper": None}.items():
        function = lambda returned=returned: returned
        function.__module__ = module.__name__
        setattr(module, name, function)
    module.examples_of, module.Mapping = examples_of, dict
    return module


def test_examples_have_the_names_of_their_methods_and_variants():
    found = examples_of(examples(third=3.0, second="2", first={"one": 1, "zero": 0}), METHODS)
    assert dict(found) == {"first, one": 1, "first, zero": 0, "second": "2", "third": 3.0}
    assert len(found) == 4 and found.one_of_each == ["first, one", "second", "third"]
    assert [found.method_of(name) for name in found] == [int, int, str, float]


def test_a_method_without_an_example_is_reported():
    """Where the example is asked for, so that the tests of other methods run."""
    found = examples_of(examples(first={"one": 1}, third=3.0), METHODS)
    assert list(found) == ["first, one", "third", "second"] and len(found) == 3
    assert found["third"] == 3.0 and found.one_of_each == ["first, one", "third", "second"]
    with pytest.raises(
        LookupError, match=r"'second', .*write a function second\(\) in tests/contracts/examples/folder.py"
    ):
        found["second"]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ({"first": 1, "fourth": 4}, r"folder.py has functions without a method: fourth; METHODS lists \['first'"),
        ({"first": {}}, r"first\(\) in .* must return an example or a dictionary of them, got an empty one"),
    ],
    ids=["no method", "no variant"],
)
def test_examples_that_no_test_would_use_are_refused(functions, message):
    with pytest.raises(ValueError, match=message):
        examples_of(examples(**functions), METHODS)
