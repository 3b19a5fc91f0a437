"""Measures how well a model predicts held-out text, in bits per byte, beside xz and an n-gram model.

Bits per byte compare models and compressors whatever their units: a language model with an arithmetic coder would
compress the text to that size. Every document is scored from its first token on, each token after at least half a
context, where the document has that many tokens before it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decodax.scripts import demo_baselines
from decodax.scripts.demo_corpus import Document


def scored_rows(
    documents: list[np.ndarray], context: int, separator: int = 0
) -> tuple[Int[np.ndarray, "R T_plus_1"], Float[np.ndarray, "R T"]]:
    """Rows of `context` + 1 tokens that overlap by half, and which of their targets count: each token counts once.

    Each document starts after a separator, which is read and not scored; short rows are padded with separators.
    """
    rows, counts = [], []
    for ids in documents:
        stream = np.concatenate([[separator], ids]).astype(np.int32)
        for start in range(0, max(1, len(stream) - 1 - context // 2), context // 2):
            piece = stream[start : start + context + 1]
            count = np.zeros(context, np.float32)
            count[context // 2 if start else 0 : len(piece) - 1] = 1
            rows.append(np.pad(piece, (0, context + 1 - len(piece)), constant_values=separator))
            counts.append(count)
    return np.stack(rows), np.stack(counts)


def model_bits(
    logits: Callable[[Any, Int[Array, "B T"]], Float[Array, "B T V"]],
    params: Any,
    documents: list[np.ndarray],
    *,
    context: int,
    batch: int = 4,
) -> float:
    """Information content, in bits, of the documents' tokens; `logits` is called on tokens[batch, context]."""

    @jax.jit
    def nats(params, rows, count):
        log_probability = jax.nn.log_softmax(logits(params, rows[:, :-1]))
        chosen = jnp.take_along_axis(log_probability, rows[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(chosen * count)

    rows, counts = scored_rows(documents, context)
    missing = -len(rows) % batch
    rows, counts = (np.pad(array, ((0, missing), (0, 0))) for array in (rows, counts))
    pieces = [nats(params, rows[i : i + batch], counts[i : i + batch]) for i in range(0, len(rows), batch)]
    return float(np.sum(jax.device_get(pieces), dtype=np.float64)) / math.log(2)


def baseline_bits(
    train: list[Document],
    heldout: list[Document],
    encode: Callable[[list[Document]], list[np.ndarray]],
    *,
    vocabulary: int,
    orders: int = 5,
) -> dict[str, float]:
    """Bits of the held-out documents under the n-gram model and under xz, alone and after the training documents."""
    ngram = demo_baselines.KneserNey(encode(train), vocabulary, orders)
    text = b"".join(document.text.encode() for document in heldout)
    before = b"".join(document.text.encode() for document in train)
    return {
        f"{orders}-gram, interpolated Kneser-Ney": sum(ngram.bits(ids) for ids in encode(heldout)),
        "xz -9e": 8.0 * demo_baselines.xz_bytes(text),
        "xz -9e after the training split": 8.0 * demo_baselines.xz_bytes_after(text, before),
    }
