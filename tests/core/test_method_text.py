"""A method and its options are read from one text; what is no such text is refused in one line."""

from dataclasses import dataclass, field

import pytest

from decodax.core.method_text import method_from_text, option_names


@dataclass(frozen=True)
class Sized:
    """Has options of every kind."""

    size: int = 1
    rate: float = 0.5
    exact: bool = True
    kind: str | None = None
    derived: int = field(init=False, default=0)


class Plain:
    """Has no options."""


def function():
    """Is no class."""


METHODS = {"sized": Sized, "plain": Plain, "function": function}


def read(text, **options):
    return method_from_text("method", text, METHODS, **options)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sized", Sized()),
        ("sized:7", Sized(7)),
        ("sized:7,rate=1e-3", Sized(7, 1e-3)),
        ("sized,rate=0.25", Sized(rate=0.25)),
        ("sized:rate=0.25,size=3", Sized(3, 0.25)),
        (" sized : 7 , exact = False ,kind=a:b", Sized(7, exact=False, kind="a:b")),
        ("sized:rate=2", Sized(rate=2)),
        ("function", function),
    ],
)
def test_texts(text, wanted):
    assert read(text) == wanted
    assert isinstance(read("plain"), Plain)


def test_options_apart_from_the_text():
    assert read("sized:7", apart={"rate": 0.25}) == Sized(7, 0.25)
    assert option_names(Sized) == ["size", "rate", "exact", "kind"] and option_names(function) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must be one of .* or none, got ''"),
        (":7", r"must be one of .* or none, got ':7'"),
        ("two words", r"must be one of .* or none, got 'two words'"),
        ("sized:", "'' is no option=value"),
        ("sized,7", "'7' is no option=value"),
        ("sized:rate=0.5,7", "'7' is no option=value"),
        ("sized:=7", "'=7' is no option=value"),
        ("sized:rate=", "'rate=' is no option=value"),
        ("sizes:7", r"must be one of \['function', 'plain', 'sized'\] or none, got 'sizes:7': did you mean 'sized'\?"),
        ("xyz", r"or none, got 'xyz'$"),
        ("sized:speed=2", "'sized' has no option speed: its options are size, rate, exact, kind"),
        ("sized:derived=2", "'sized' has no option derived"),
        ("sized:7,size=8", "size is given twice: 7 and 8, with method='sized:7,size=8'"),
        ("sized:auto", "size must be a whole number, got 'auto'"),
        ("sized:0.5", r"size must be a whole number, got 0\.5"),
        ("sized:true", "size must be a whole number, got True"),
        ("sized:rate=high", "rate must be a number, got 'high'"),
        ("sized:exact=1", "exact must be true or false, got 1"),
        ("sized:kind=7", "kind must be a text, got 7"),
        ("plain:7", "method 'plain' has no option 7: it takes none"),
        ("function:a=1", "method 'function' has no option a: it takes none"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ValueError, match=message):
        read(text, otherwise=" or none")


def test_an_option_in_the_text_and_apart_from_it():
    with pytest.raises(ValueError, match="size is given twice: 7 and 9"):
        read("sized:7", apart={"size": 9})
    with pytest.raises(ValueError, match="'function' has no option size"):
        read("function", apart={"size": 9})
