"""Computes prefill attention (a prompt, or a chunk of one) over one set of keys, on TPU, Hopper GPUs and XLA.

FlashAttention-2, arXiv 2307.08691. Chunked prefill runs it once over the cached tokens and once over the chunk's own;
the log-sum-exps merge the two partial softmaxes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from decodax.kernels_pallas.flash_prefill import reference
from decodax.kernels_pallas.flash_prefill.spans import Rows, Rules, Segments
from decodax.kernels_pallas.selection import Implementation, KernelSelection, select_in_folder

__all__ = ["flash_prefill", "select_flash_prefill"]


def flash_prefill(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B K S H"],
    value: Float[Array, "B K S I"],
    *,
    scale: float,
    causal: bool,
    offset: Int[Array, " B"] | None = None,
    length: Int[Array, " B"] | None = None,
    window: int | None = None,
    num_sink_tokens: int | Int[Array, " B"] = 0,
    softcap: float | None = None,
    sink_logits: Float[Array, " N"] | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N I"], Float[Array, "B T N"]]:
    """softmax(scale q k^T) v in the queries' dtype, and the log-sum-exp of the unmasked scores, in float32.

    Query head n uses key-value head n // (N / K). A query that attends to nothing gives 0 and a log-sum-exp of -inf.

    query: of T tokens.
    key, value: one set of keys, a cache or the prompt's own.
    scale: of the scores.
    causal: query t is at index `offset + t` among the keys and attends to no later one.
    offset: per row; None: 0. To attend to a cache, offset and length are both the number of cached tokens.
    length: keys that exist, per row (None: all S). Later ones are masked, and may be NaN.
    window: a query attends to the last `window` keys up to its own index, itself included; needs causal.
    num_sink_tokens: first keys to attend to besides the window (StreamingLLM, arXiv 2309.17453); an array if rows
        differ, as in a chunk of which some rows still hold the sinks and others have them in their cache.
    softcap: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
    sink_logits: per head one more score that has no value (gpt-oss); the log-sum-exp includes it.
    query_segments, key_segments: a query attends only to keys of its own segment (packed prompts).
    implementation: None takes the kernel of this device if it supports the operands, else XLA.

    Raises ValueError for operands that do not fit each other. What depends on values is checked only outside of
    `jax.jit`; inside, lengths are clipped to 0 .. S.
    Raises NotImplementedError if the implementation asked for does not support the operands.
    """
    selection = select_flash_prefill(query, key, value, implementation=implementation)
    _check_options(causal, window, num_sink_tokens, softcap, scale)
    batch, num_keys = query.shape[0], key.shape[2]
    _check_values(length, num_keys, num_sink_tokens)
    rows = Rows(
        jnp.zeros(batch, jnp.int32) if offset is None else offset.astype(jnp.int32),
        jnp.full(batch, num_keys, jnp.int32) if length is None else jnp.clip(length.astype(jnp.int32), 0, num_keys),
        jnp.broadcast_to(jnp.asarray(num_sink_tokens, jnp.int32), (batch,)),
    )
    rules = Rules(causal, window)
    segments = _segments(query_segments, key_segments, query, key)
    if sink_logits is not None and sink_logits.shape != (query.shape[2],):
        raise ValueError(f"sink_logits must hold one number per query head ({query.shape[2]}), got {sink_logits.shape}")
    options: dict[str, Any] = {"scale": scale, "rules": rules, "softcap": softcap}
    with jax.named_scope("flash_prefill"):
        if selection.backend == "tpu":
            from decodax.kernels_pallas.flash_prefill import kernel_tpu as kernel
        elif selection.backend == "gpu":
            from decodax.kernels_pallas.flash_prefill import kernel_gpu as kernel
        else:
            return reference.flash_prefill(query, key, value, rows, segments, sink_logits, **options)
        return kernel.flash_prefill(
            query, key, value, rows, segments, sink_logits, **options, interpret=selection.interpret
        )


def select_flash_prefill(
    query: Any, key: Any, value: Any, *, implementation: Implementation | None = None
) -> KernelSelection:
    """The implementation for these operands (arrays or shapes), and the reason. Raises as `flash_prefill` does."""
    _check_shapes(query, key, value)
    return select_in_folder("flash_prefill", implementation, query, key, value)


def _check_shapes(query: Any, key: Any, value: Any) -> None:
    if not (len(query.shape) == len(key.shape) == len(value.shape) == 4):
        raise ValueError(
            "query must be [B, T, N, H], key [B, K, S, H] and value [B, K, S, I], "
            f"got {query.shape}, {key.shape} and {value.shape}"
        )
    batch, _, num_heads, head_size = query.shape
    if key.shape[0] != batch or key.shape[3] != head_size or key.shape[:3] != value.shape[:3]:
        raise ValueError(
            "query [B, T, N, H], key [B, K, S, H] and value [B, K, S, I] must agree in B, K, S and H, "
            f"got {query.shape}, {key.shape} and {value.shape}"
        )
    if 0 in query.shape or 0 in key.shape or value.shape[3] == 0:
        raise ValueError(f"there must be queries and keys, got {query.shape}, {key.shape} and {value.shape}")
    if num_heads % key.shape[1]:
        raise ValueError(f"the {num_heads} query heads must be a multiple of the {key.shape[1]} key-value heads")


def _check_options(
    causal: bool, window: int | None, num_sink_tokens: int | Array, softcap: float | None, scale: float
) -> None:
    if window is not None and not causal:
        raise ValueError("window needs causal=True: it is counted back from the query's own index")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query's own token), got {window}")
    if window is None and not (isinstance(num_sink_tokens, int) and num_sink_tokens == 0):
        raise ValueError("num_sink_tokens needs a window: without one every key before the query is read anyway")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive (None for no cap), got {softcap}")
    if not np.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale}")


def _check_values(length: Array | None, num_keys: int, num_sink_tokens: int | Array) -> None:
    if length is not None and not isinstance(length, Tracer):
        lengths = np.asarray(length)
        if np.any(lengths < 0) or np.any(lengths > num_keys):
            raise ValueError(f"length must be in 0..{num_keys} (there are {num_keys} keys), got {lengths.tolist()}")
    if not isinstance(num_sink_tokens, Tracer) and np.any(np.asarray(num_sink_tokens) < 0):
        raise ValueError(f"num_sink_tokens must not be negative, got {np.asarray(num_sink_tokens).tolist()}")


def _segments(query_segments: Array | None, key_segments: Array | None, query: Array, key: Array) -> Segments | None:
    if query_segments is None and key_segments is None:
        return None
    if query_segments is None or key_segments is None:
        raise ValueError("query_segments and key_segments go together, got only one of them")
    expected = (query.shape[:2], (key.shape[0], key.shape[2]))
    if (query_segments.shape, key_segments.shape) != expected:
        raise ValueError(
            f"query_segments and key_segments must be [B, T] and [B, S], {expected[0]} and {expected[1]}, "
            f"got {query_segments.shape} and {key_segments.shape}"
        )
    return Segments(query_segments.astype(jnp.int32), key_segments.astype(jnp.int32))
