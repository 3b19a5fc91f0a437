"""Chat templates are written in transformers' Jinja; one that is wrong, forbidden or endless is one clear line."""

import pytest

from decodax.models.tokenizers import chat_limits
from decodax.models.tokenizers.chat_template import render_chat

QUESTION = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "values", "expected"),
    [
        ("{{ x | tojson }}", {"x": {"b": "<&'é>", "a": [1, None, 0.5]}}, '{"b": "<&\'é>", "a": [1, null, 0.5]}'),
        ("{{ x | tojson(indent=1, sort_keys=true) }}", {"x": {"b": 1, "a": 2}}, '{\n "a": 2,\n "b": 1\n}'),
        ("{{ x | tojson(ensure_ascii=true, separators=(',', ':')) }}", {"x": {"é": 1, "b": 2}}, '{"\\u00e9":1,"b":2}'),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", {}, "a\nb\nc"),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", {}, "01345678"),
        ("{% for i in range(9) %}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}", {}, "01234"),
        ("{% generation %}a{% set b = 3 %}{% endgeneration %}{{ b }}", {}, "a"),
        ("{{ nothing }}{{ x.nothing }}|{{ x['nothing'] is defined }}", {"x": {}}, "|False"),
        ("{{ dict(a=1) }}{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}", {}, "{'a': 1}2"),
        ("{{ x.items() | list }}", {"x": {"items_": 1}}, "[('items_', 1)]"),
        (
            "{% for k, v in x | dictsort %}{{ loop.index ~ k ~ v }}{{ loop.length }}{{ loop.last }}{% endfor %}",
            {"x": {"b": 1, "a": 2}},
            "1a22False2b12True",
        ),
        ("{% for i in [[1, [2]], [3]] recursive %}{{ i if i is number else loop(i) }}{% endfor %}", {}, "123"),
        ("{{ x | join('-') }}{{ x | join(', ', attribute='a') }}", {"x": [{"a": 1}]}, "{'a': 1}1"),
        ("{{ 'aXbX' | replace('X', 'yy', 1) }}{{ 'aXbX'.replace('X', '') }}", {}, "ayybXab"),
        ("{{ x }}{{ x is none }}", {"x": None}, "NoneTrue"),
        ("{{ '%s: %5.1f' % ('a', 2) }}{{ 'b' * 3 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ [1] + [2] }}", {}, "a:   2.0bbb332[1, 2]"),
        ("{{ '{:>4}'.format('a') }}{{ 'a' | center(3) }}|", {}, "   a a |"),
    ],
)
def test_the_language_is_that_of_transformers(template, values, expected):
    assert render_chat(template, QUESTION, variables=values) == expected


def test_the_date_is_today_s(monkeypatch):
    from decodax.models.tokenizers import chat_sandbox

    class Clock(chat_sandbox.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, 7, 11, 13)

    monkeypatch.setattr(chat_sandbox, "datetime", Clock)
    assert render_chat("{{ strftime_now('%d %b %Y') }}", QUESTION) == "07 Mar 2026"


ENDLESS = "the chat template does not end: it takes "
TEXT, ARGUMENT, FORMAT = ENDLESS + "a text or list longer", ENDLESS + "an argument beyond", ENDLESS + "a format with a"
GROWING = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x OPERATOR n.x %}{% endfor %}"
BRANCHING = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}", "more than 1,013 steps"),
        (BRANCHING, ENDLESS + "more than"),
        ("{% for a in [0] recursive %}{{ loop(range(99999)) if a == 0 }}{% endfor %}", "steps|recursion"),
        ("{% for i in range(1000) %}{{ 'a' * 99999 }}{% endfor %}", TEXT + " than 16,777,216"),
        ("{{ 'a' * 10**9 }}", TEXT),
        ("{{ [1] * 10**9 }}", TEXT),
        ("{{ 10**9 * 'a' }}", TEXT),
        ("{{ 10 ** (10 ** 9) }}", ENDLESS + "an integer of more than 4,096 bits"),
        (GROWING.replace("OPERATOR", "~"), TEXT),
        (GROWING.replace("OPERATOR", "+"), TEXT),
        ("{% set x = 'a' * 9999 %}{{ x | replace('a', x) }}", TEXT),
        ("{% set x = 'a' * 9999 %}{{ x.replace('a', x) }}", TEXT),
        ("{% set x = 'a' * 9999 %}{{ ([x] * 9999) | join(x) }}", TEXT),
        ("{% set x = 'a' * 9999 %}{{ x.join([x] * 9999) }}", TEXT),
        ("{{ 'a' | center(10**9) }}{{ 'a'.center(10**9) }}", ARGUMENT),
        ("{{ 'a'.center(10**9) }}", ARGUMENT),
        ("{{ [1] | slice(10**9) | list }}", ARGUMENT),
        ("{{ '%999999999d' % 1 }}", FORMAT),
        ("{{ '%*d' % (10**9, 1) }}", FORMAT),
        ("{{ '{:999999999}'.format(1) }}", FORMAT),
        ("{{ '{:{}}'.format(1, 10**6) }}", FORMAT),
        ("{{ lipsum(n=10**6) }}", "fails on these messages: 'lipsum' is undefined"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "does what is forbidden: access to attribute '__class__' of 'str'"),
        ("{{ messages.append(1) }}", "does what is forbidden: .*'append' of 'list'"),
        ("{{ messages[0].update(a=1) }}", "does what is forbidden: .*'update' of 'dict'"),
        ("{{ ''['format']('{0.__class__}', 1)() }}", "fails|forbidden"),
        ("{{ namespace(__init__=1) }}", "forbidden: a namespace has no name '__init__'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "forbidden: a namespace has no name '_x'"),
        ("{% include 'x' %}", "fails on these messages: no loader"),
        ("{{ raise_exception('no \x1b[2J\\nway') }}", r"^the chat template refuses the messages: no \\x1b\[2J\\nway$"),
        ("a\n{% if %}", "^the chat template is wrong in line 2: Expected an expression"),
        ("{% endfor %}", "wrong in line 1"),
        ("{{ messages[5].content.x }}", "fails on these messages: .*has no element 5"),
        ("{{ 1 / 0 }}", "fails on these messages: division by zero"),
        ("{% for a in 5 %}{% endfor %}", "fails on these messages: 'int' object is not iterable"),
        ("{{ 'a' + 1 }}", "fails on these messages: can only concatenate"),
        ("(" * 99 + "{{ " + "(" * 9999 + " }}", "wrong in line|fails"),
    ],
)
def test_a_template_that_is_wrong_or_endless_is_one_line(template, message, monkeypatch):
    monkeypatch.setattr(chat_limits, "MAX_STEPS", 1_013)
    with pytest.raises(ValueError, match=message) as error:
        render_chat(template, QUESTION)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
