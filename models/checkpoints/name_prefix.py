"""Finds the prefix with which a checkpoint stores the tensor names that a model expects.

A program that wraps a model (a vision tower beside it, PEFT, `torch.compile`, data parallelism) saves the model's
tensors under the wrapper's name: "language_model.model.layers.0...." for "model.layers.0....". The file of a base model
has no "model." at all. If all names agree up to one such prefix, they are the same model.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Set
from dataclasses import dataclass

BODY = "model."  # prefix of all names but the head's in most families
_MAX_PREFIXES = 8  # of a name that are tried: nested wrappers


@dataclass(frozen=True)
class TensorNames:
    """A file's names for a model's tensors.

    body: replaces `expected_body`.
    head: prefix of the other names.
    expected_body: the prefix of all names but the head's, as the family's class of causal models saves them.

    >>> names = TensorNames("language_model.model.", "language_model.")
    >>> names.in_file("model.norm.weight"), names.in_file("lm_head.weight")
    ('language_model.model.norm.weight', 'language_model.lm_head.weight')
    >>> names.expected("language_model.model.norm.weight"), names.expected("language_model.lm_head.weight")
    ('model.norm.weight', 'lm_head.weight')
    """

    body: str = BODY
    head: str = ""
    expected_body: str = BODY

    def in_file(self, name: str) -> str:
        """The file's name for a tensor."""
        own = self.expected_body
        return self.body + name.removeprefix(own) if name.startswith(own) else self.head + name

    def expected(self, name: str) -> str:
        """The inverse; a name with neither prefix stays as it is."""
        if name.startswith(self.body):
            return self.expected_body + name.removeprefix(self.body)
        return name.removeprefix(self.head)

    @property
    def is_wrapped(self) -> bool:
        """Whether the names are neither those of a causal model nor those of its base model."""
        return (self.body, self.head) not in ((self.expected_body, ""), ("", ""))

    @property
    def are_expected(self) -> bool:
        """Whether the files have the expected names."""
        return (self.body, self.head) == (self.expected_body, "")


def find_names(stored: Collection[str], expected: Set[str], body_prefix: str = BODY) -> TensorNames:
    """The prefixes with which most of the expected names are stored; the usual ones if none is.

    stored, expected: names.
    body_prefix: of the expected names but the head's.

    >>> find_names(["m.norm.weight", "lm_head.weight"], {"model.norm.weight", "lm_head.weight"})
    TensorNames(body='m.', head='', expected_body='model.')
    """
    own = TensorNames(body_prefix, expected_body=body_prefix)
    bodies = {name.removeprefix(body_prefix) for name in expected if name.startswith(body_prefix)}
    others = {name for name in expected if not name.startswith(body_prefix)}
    as_expected = {name for name in stored if name in expected}
    if 2 * len(as_expected) > len(stored) and not others.isdisjoint(as_expected):
        return own  # saves trying each prefix of a hundred thousand names
    body_counts, head_counts = Counter[str](), Counter[str]()
    for name in stored:
        for prefix in _prefixes(name):
            rest = name[len(prefix) :]
            if rest in bodies:
                body_counts[prefix] += 1
            elif rest in others:
                head_counts[prefix] += 1
    if not body_counts:
        return own
    body = max(body_counts, key=lambda prefix: (body_counts[prefix], prefix == body_prefix, prefix == ""))
    outer = body[: body[:-1].rfind(".") + 1]
    heads = [prefix for prefix in head_counts if body.startswith(prefix)]
    return TensorNames(body, max(heads, key=lambda prefix: (prefix == outer, len(prefix)), default=outer), body_prefix)


def _prefixes(name: str) -> Iterator[str]:
    """The empty prefix, then the first few prefixes of a dotted name, each with its dot."""
    end = 0
    for _ in range(_MAX_PREFIXES):
        yield name[:end]
        end = name.find(".", end) + 1
        if not end:
            return
