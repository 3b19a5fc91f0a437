"""Computes the baselines of the embedded model: xz, and an n-gram model over the same tokens.

The n-gram model is interpolated Kneser-Ney (Kneser and Ney 1995; interpolated form in Chen and Goodman, "An Empirical
Study of Smoothing Techniques for Language Modeling", cmp-lg/9606011), with one discount per order:

    P_n(w | h) = max(c(h w) - d_n, 0) / c(h .) + d_n N(h .) / c(h .) * P_{n-1}(w | h without its first token)

where c counts occurrences for the longest order and different left neighbours for the others, N(h .) is the number of
different continuations, P_0 is uniform, and d_n = n1 / (n1 + 2 n2) from how many counts are one and two.
"""

import lzma
from collections import Counter
from collections.abc import Iterable
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float

START = -1  # comes before the first token of a document


class KneserNey:
    """An n-gram model of token ids; `orders` tables of discounted counts, the longest context last.

    >>> model = KneserNey([[0, 1, 0, 1, 2]], vocabulary=3, orders=2)
    >>> round(float(model.probabilities([0]).sum()), 6)
    1.0
    """

    def __init__(self, documents: Iterable[Iterable[SupportsIndex]], vocabulary: int, orders: int = 5):
        self.vocabulary, self.orders = vocabulary, orders
        grams: list[Counter] = [Counter() for _ in range(orders + 1)]
        for document in documents:
            row = (START,) * (orders - 1) + tuple(int(token) for token in document)
            grams[orders].update(zip(*(row[i:] for i in range(orders)), strict=False))
        # A shorter gram counts its different left neighbours: each different longer gram adds one.
        for order in range(orders, 1, -1):
            grams[order - 1].update(gram[1:] for gram in grams[order])
        self.counts = grams
        self.totals: list[Counter] = [Counter() for _ in range(orders + 1)]
        self.continuations: list[Counter] = [Counter() for _ in range(orders + 1)]
        self.discounts = [0.0] * (orders + 1)
        for order in range(1, orders + 1):
            for gram, count in grams[order].items():
                self.totals[order][gram[:-1]] += count
            self.continuations[order].update(gram[:-1] for gram in grams[order])
            of_counts = Counter(grams[order].values())
            once, twice = of_counts[1], of_counts[2]
            self.discounts[order] = once / (once + 2 * twice) if once and twice else 0.5

    def probability(self, token: SupportsIndex, context: Iterable[SupportsIndex]) -> float:
        """P(token | context), from at most the last `orders` - 1 tokens of the context."""
        context = tuple(context)[-(self.orders - 1) :] if self.orders > 1 else ()
        result = 1.0 / self.vocabulary
        for order in range(1, min(self.orders, len(context) + 1) + 1):
            history = context[len(context) - order + 1 :]
            total = self.totals[order].get(history, 0)
            if total == 0:
                break
            discount = self.discounts[order]
            seen = max(self.counts[order].get((*history, token), 0) - discount, 0.0)
            result = (seen + discount * self.continuations[order][history] * result) / total
        return result

    def probabilities(self, context: Iterable[SupportsIndex]) -> Float[np.ndarray, "V"]:
        """The whole distribution of the next token."""
        return np.array([self.probability(token, context) for token in range(self.vocabulary)])

    def bits(self, document: Iterable[SupportsIndex]) -> float:
        """Information content of a document's tokens, each predicted from those before it."""
        row = (START,) * (self.orders - 1) + tuple(int(token) for token in document)
        first = self.orders - 1
        chances = [self.probability(row[i], row[i - first : i]) for i in range(first, len(row))]
        return float(-np.log2(chances).sum())


def xz_bytes(text: bytes) -> int:
    """Size of the text after `xz -9e`, as a raw stream without the file format's headers and check sums.

    The dictionary holds 64 MiB, as at that preset, so all of the standard library is within its reach.
    """
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))


def xz_bytes_after(text: bytes, before: bytes) -> int:
    """How many bytes `text` adds to the compressed form of `before`: xz after the training split."""
    return xz_bytes(before + text) - xz_bytes(before)
