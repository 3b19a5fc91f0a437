"""Unpacks codes of 2, 4 or 8 bits from words of 32, the lowest bits first."""

import numpy as np


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes along the last axis, uint8 [.., words * 32 / bits].

    >>> codes_of(np.array([[0x76543210]], np.uint32), 4).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    octets = np.ascontiguousarray(words.astype("<u4", copy=False)).view(np.uint8)
    if bits == 8:
        return octets
    codes = np.empty((*octets.shape, 8 // bits), np.uint8)
    for place in range(8 // bits):
        np.bitwise_and(octets >> np.uint8(place * bits), 2**bits - 1, out=codes[..., place])
    return codes.reshape(*octets.shape[:-1], octets.shape[-1] * (8 // bits))


def columns_of(words: np.ndarray, columns: np.ndarray, bits: int, places: np.ndarray | None = None) -> np.ndarray:
    """Some of the codes along the last axis, uint8 [.., columns].

    columns: their indices.
    places: where in its word each of the first 32 / bits codes is; None: in order.
    """
    per_word = 32 // bits
    word, code = np.divmod(columns, per_word)
    place = code if places is None else places[code]
    first, end = int(word.min(initial=words.shape[-1])), int(word.max(initial=0)) + 1
    if (end - first) * per_word <= 2 * len(columns):  # most codes of these words: unpacked, then chosen, as bytes
        return codes_of(words[..., first:end], bits).take((word - first) * per_word + place, axis=-1)
    codes = words[..., word]  # a copy
    codes >>= (place * bits).astype(np.uint32)
    codes &= np.uint32(2**bits - 1)
    return codes.astype(np.uint8)


def halves(octets: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    """Both codes of four bits in each byte along the last axis, uint8 [.., 2 * bytes].

    >>> halves(np.array([0x21, 0x43], np.uint8)).tolist()
    [1, 2, 3, 4]
    """
    codes = np.empty((*octets.shape, 2), np.uint8)
    first, second = (1, 0) if high_first else (0, 1)
    np.bitwise_and(octets, 15, out=codes[..., first])
    np.right_shift(octets, 4, out=codes[..., second])
    return codes.reshape(*octets.shape[:-1], 2 * octets.shape[-1])
