"""Trains the prompt embeddings of parallel prompt decoding; the model itself stays frozen.

Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference, arXiv 2405.18628. A place in
the text is followed by m prompt tokens; the logits at the i-th shall be those that the model has i tokens further on,
when it continues greedily by itself. The loss is the mean over i of 0.8^(i-1) KL(model || prompt token), the direction
of the authors' code (their paper prints the other).

Departs from the paper in that every window of text is cut at many places at once: the window runs once, and the prompt
tokens and greedy continuations of all places attend to its keys and values, each only up to its own place. Windows are
plain text, not the answers of conversations.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decodax.decoding.ranked_tokens import rank_accuracies
from decodax.decoding.training.auxiliary import AuxiliaryTraining
from decodax.decoding.training.distillation import kl_divergence
from decodax.layers.attention.mask import Ancestors
from decodax.layers.kv_cache.staged import place, stage
from decodax.models.model import Model, Params

RANKS = 10  # ranks per distance whose accuracy is measured
TOKENS_PER_CUT = 8  # window tokens for each place at which a window is cut
DISTANCE_DECAY = 0.8


@dataclass(frozen=True)
class PromptTokensShape:
    """The prompt embeddings.

    distances: m, how many tokens ahead are predicted.
    ensemble: n embeddings per distance, whose logits are averaged.
    """

    distances: int = 3
    ensemble: int = 1

    def __post_init__(self) -> None:
        if self.distances < 1 or self.ensemble < 1:
            raise ValueError(f"distances and ensemble must be at least 1, got {self.distances} and {self.ensemble}")


class Window(NamedTuple):
    """A window that has been run, and the places at which it is cut.

    updates: every layer's cache update of the window's T tokens.
    position: of these tokens.
    cut: [b, a] is the position of the last token before a cut.
    first: the most probable token after it.
    """

    updates: tuple[Any, ...]
    position: Int[Array, "B T"]
    cut: Int[Array, "B A"]
    first: Int[Array, "B A"]


@dataclass(frozen=True)
class PromptTokensTraining(AuxiliaryTraining):
    """Trains {"embedding": Float[m, n, D]}; `shape` is a `PromptTokensShape`."""

    shape: PromptTokensShape

    kind = "ppd"
    curve_title, curve_unit = "Distilling prompt tokens", "KL(target || prompt token), nats"
    curve_shares: ClassVar[dict[str, str]] = {f"distance_{i}": f"{i} ahead, most probable" for i in (1, 2, 3)}

    def initial(self) -> Params:
        return {"embedding": initial_embedding(self.target.params, self.target.model, self.shape, self.plan.seed)}

    def loss(self, trained, target_params, rows, step):
        tokens = jnp.asarray(rows)[:, :-1]
        num_cuts = max(1, tokens.shape[1] // TOKENS_PER_CUT)
        cut = jax.random.randint(jax.random.key(step), (tokens.shape[0], num_cuts), 0, tokens.shape[1])
        target, found = _logits(self.target.model, target_params, trained["embedding"], tokens, cut)
        weight = jnp.asarray([DISTANCE_DECAY**i for i in range(self.shape.distances)], jnp.float32)
        return jnp.mean(kl_divergence(target, found) * weight[None, None, :])

    def measure(self, trained: Params, windows: Int[np.ndarray, "W T_plus_1"]) -> dict[str, Any]:
        size = windows.shape[1] - 1
        cut = np.arange(TOKENS_PER_CUT // 2, size, TOKENS_PER_CUT, dtype=np.int32) if size > TOKENS_PER_CUT else [0]
        sums, batch = np.zeros((self.shape.distances, 1 + RANKS)), 4
        for start in range(0, len(windows), batch):
            piece = windows[start : start + batch, :-1]
            counted = np.arange(batch) < len(piece)
            padded = np.pad(piece, ((0, batch - len(piece)), (0, 0)))
            places = np.broadcast_to(np.asarray(cut, np.int32), (batch, len(cut)))
            found = _sums(self.target.model, self.target.params, trained["embedding"], padded, places, counted)
            sums += np.asarray(found, np.float64)
        count = len(windows) * len(cut)
        accuracy = (sums[:, 1:] / count).tolist()
        shares = {f"distance_{i}": float(ranks[0]) for i, ranks in enumerate(accuracy, start=1)}
        return {"heldout_loss": float(np.mean(sums[:, 0]) / count), "rank_accuracy": accuracy, **shares}


def initial_embedding(params: Params, model: Model, shape: PromptTokensShape, seed: int) -> Float[Array, "m n D"]:
    """The embeddings of m x n different tokens, drawn at random."""
    draw = np.random.default_rng(seed)
    count = shape.distances * shape.ensemble
    token = draw.choice(model.config.vocab_size, count, replace=count > model.config.vocab_size).astype(np.int32)
    tokens = jnp.asarray(token)[None]
    vectors = model.embed(params, tokens, jnp.zeros_like(tokens))[0].astype(jnp.float32)
    return vectors.reshape(shape.distances, shape.ensemble, -1)


def _logits(
    model: Model, params: Params, embedding: Float[Array, "m n D"], tokens: Int[Array, "B T"], cut: Int[Array, "B A"]
) -> tuple[Float[Array, "B A m V"], Float[Array, "B A m V"]]:
    """Logits of the model 1 .. m tokens after its own next token at every cut, and those of the prompt tokens."""
    window = jax.lax.stop_gradient(_run_window(model, params, tokens, cut))
    target = jax.lax.stop_gradient(_continued(model, params, window, embedding.shape[0]))
    return target, _prompted(model, params, embedding, window)


def _run_window(model: Model, params: Params, tokens: Int[Array, "B T"], cut: Int[Array, "B A"]) -> Window:
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    out = model.apply(params, tokens, position)
    at_cut = jnp.take_along_axis(out.hidden, cut[:, :, None], axis=1)
    return Window(out.cache_updates, position, cut, jnp.argmax(model.logits(params, at_cut), axis=-1).astype(jnp.int32))


def _continued(model: Model, params: Params, window: Window, num_tokens: int) -> Float[Array, "B A m V"]:
    """Logits after each of the `num_tokens` tokens with which the model continues greedily at every cut."""
    (batch, size), num_cuts = window.position.shape, window.cut.shape[1]
    step = jnp.arange(num_tokens, dtype=jnp.int32)
    after = (window.cut[:, None, :] + 1 + step[None, :, None]).reshape(batch, -1)
    position = jnp.concatenate([window.position, after], axis=1)
    empty = model.empty_update(batch, position.shape[1], model.dtype(params))
    updates, token, found = place(empty, window.updates, jnp.arange(size, dtype=jnp.int32)), window.first, []
    own = np.eye(num_cuts, dtype=bool)
    for index in range(num_tokens):
        is_run = np.repeat(np.arange(num_tokens) < index, num_cuts)
        reads = np.concatenate([np.tile(own, num_tokens) & is_run, own], axis=1)
        reads = jnp.broadcast_to(jnp.asarray(reads)[None], (batch, *reads.shape))
        mask = Ancestors(jnp.concatenate([_before_cut(window), reads], axis=2))
        staged = stage((None,) * len(updates), updates, position)
        out = model.apply(params, token, window.cut + 1 + index, staged, mask=mask)
        logits = model.logits(params, out.hidden)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        found.append(logits)
        updates = place(updates, out.cache_updates, size + index * num_cuts + jnp.arange(num_cuts, dtype=jnp.int32))
    return jnp.stack(found, axis=2)


def _prompted(
    model: Model, params: Params, embedding: Float[Array, "m n D"], window: Window
) -> Float[Array, "B A m V"]:
    """Logits at the prompt tokens after every cut, averaged over the ensemble; no member attends to another."""
    (batch, num_cuts), (distances, ensemble, width) = window.cut.shape, embedding.shape
    chains = num_cuts * ensemble
    vectors = jnp.moveaxis(embedding, 1, 0).reshape(1, ensemble * distances, width)
    vectors = jnp.broadcast_to(vectors[:, None], (batch, num_cuts, ensemble * distances, width))
    vectors = vectors.reshape(batch, chains * distances, width).astype(model.dtype(params))
    of_chain = jnp.repeat(window.cut, ensemble, axis=1)
    position = (of_chain[:, :, None] + 1 + jnp.arange(distances, dtype=jnp.int32)[None, None, :]).reshape(batch, -1)
    before = jnp.repeat(_before_cut(window), ensemble * distances, axis=1)
    own = np.kron(np.eye(chains, dtype=bool), np.tri(distances, dtype=bool))
    allowed = jnp.concatenate([before, jnp.broadcast_to(jnp.asarray(own)[None], (batch, *own.shape))], axis=2)
    staged = stage((None,) * len(window.updates), window.updates, window.position)
    out = model.apply(params, vectors, position, staged, mask=Ancestors(allowed))
    logits = model.logits(params, out.hidden).reshape(batch, num_cuts, ensemble, distances, -1)
    return jnp.mean(logits, axis=2)


def _before_cut(window: Window) -> Bool[Array, "B A T"]:
    """Which tokens of the window are before each cut."""
    return window.position[:, None, :] <= window.cut[:, :, None]


def _accuracy_sums(
    model: Model, params: Params, embedding: Array, tokens: Array, cut: Array, counted: Array
) -> Float[Array, "m sums"]:
    """Per distance, over all cuts of the counted rows: KL, and how often the token of rank r is the model's."""
    target, found = _logits(model, params, embedding, tokens, cut)
    divergence = jnp.sum(kl_divergence(target, found) * counted[:, None, None].astype(jnp.float32), axis=(0, 1))
    expected = jnp.argmax(target, axis=-1)
    is_counted = jnp.broadcast_to(counted[:, None], cut.shape)
    ranks = [rank_accuracies(found[:, :, i], expected[:, :, i], is_counted, RANKS) for i in range(embedding.shape[0])]
    return jnp.concatenate([divergence[:, None], jnp.stack(ranks)], axis=1)


_sums = jax.jit(_accuracy_sums, static_argnums=0)
