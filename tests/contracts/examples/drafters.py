"""Gives an example of each drafter, made for any target, with the weights that it drafts with.

A function returns what makes the `Example` from a `Target`, so that the same examples serve targets of every kind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from decodax import decoding
from decodax.decoding.drafters import (
    Drafter,
    DraftModel,
    DynamicExit,
    EarlyLayers,
    Hints,
    Kangaroo,
    MedusaHeads,
    MTPHead,
    NestedDraft,
    NoDraft,
    PromptLookup,
    PromptTokens,
    Recording,
    Replay,
)
from decodax.decoding.prompt_tree import PromptTree, dynamic_trees
from decodax.decoding.training.kangaroo import initial_adapter
from decodax.decoding.verifiers import ExactMatch
from decodax.models.medusa_heads import MedusaShape, initial_heads
from decodax.models.model import Model
from tests.contracts.outside import OUTSIDE

TREES = dynamic_trees([[0.5, 0.2, 0.1], [0.4, 0.2, 0.1]], 12)
ENSEMBLE = (PromptTree((-1, 0, 0, 1), (2, 2, 1, 2)),)
HEADS = (-1, *[0] * 6, *[1] * 3, 2)  # wide, as heads that nobody trained are seldom right
CONFIDENCE = 0.15  # adapters that nobody trained are more confident than this of about half of their tokens


@dataclass(frozen=True)
class Target:
    """What examples are made for.

    params: the target's.
    draft: parameters of the same model that mostly agree with them.
    written: what plain decoding writes, [B, S], and a token after it, so that recordings reach beyond the end.
    """

    model: Model
    params: Any
    draft: Any
    written: Any

    @property
    def exit_layer(self) -> int:
        return self.model.config.num_layers - 1


@dataclass(frozen=True)
class Example:
    """A drafter and its weights.

    has_rows: whether `draft_params` have an axis of rows, being made for a batch.
    """

    drafter: Drafter
    draft_params: Any = None
    has_rows: bool = False


Make = Callable[[Target], Example]


def _noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _prompt_embeddings(target: Target, ensemble: int = 1) -> dict[str, Any]:
    return {"embedding": jax.numpy.asarray(_noise(3, 2, ensemble, target.model.config.hidden_size))}


def no_draft() -> Make:
    return lambda target: Example(NoDraft())


def prompt_lookup() -> Make:
    return lambda target: Example(PromptLookup(3, max_ngram=2))


def draft_model() -> dict[str, Make]:
    return {
        "chain": lambda target: Example(DraftModel.chain(target.model, 3), target.draft),
        "tree": lambda target: Example(DraftModel.top_k(target.model, (-1, 0, 0, 1, 1, 2)), target.draft),
    }


def early_layers() -> Make:
    return lambda target: Example(EarlyLayers(target.model, target.exit_layer, 3))


def del_choice() -> Make:
    return lambda target: Example(DynamicExit(target.model, 3))


def hints() -> Make:
    return lambda target: Example(Hints(target.model, (-1, 0, 0, 1), num_likely=5), target.draft)


def prompt_tokens() -> dict[str, Make]:
    def ensemble(target: Target) -> Example:
        return Example(PromptTokens(target.model, ENSEMBLE, ensemble=2), _prompt_embeddings(target, 2))

    return {
        "dynamic trees": lambda target: Example(PromptTokens(target.model, TREES), _prompt_embeddings(target)),
        "ensemble": ensemble,
    }


def nested() -> Make:
    def make(target: Target) -> Example:
        inner = decoding.speculative(target.model, PromptTokens(target.model, TREES), ExactMatch())
        return Example(NestedDraft(inner, 3), {"model": target.draft, "drafter": _prompt_embeddings(target)})

    return make


def kangaroo() -> Make:
    def make(target: Target) -> Example:
        adapter = initial_adapter(target.model, target.params, target.exit_layer)
        return Example(Kangaroo(target.model, target.exit_layer, 3, CONFIDENCE), {"adapter": adapter})

    return make


def medusa_heads() -> Make:
    def make(target: Target) -> Example:
        random = np.random.default_rng(11)
        heads = initial_heads(target.params, MedusaShape(2))
        heads = jax.tree.map(lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape, np.float32), heads)
        return Example(MedusaHeads(target.model, HEADS), heads)

    return make


def mtp_head() -> Make:
    """The target's own last layer, on twice the hidden state before the last token and a quarter of its embedding."""

    def make(target: Target) -> Example:
        size, last = target.model.config.hidden_size, target.model.config.num_layers - 1
        ones = {"weight": np.ones(size, np.float32)}
        head = {
            "embedding_norm": ones,
            "hidden_norm": ones,
            "join": np.eye(size, 2 * size, dtype=np.float32) / 4 + 2 * np.eye(size, 2 * size, size, dtype=np.float32),
            "block": target.params[f"blocks_{last}"],
            "final_norm": target.params["final_norm"],
        }
        return Example(MTPHead(target.model, 3), jax.tree.map(jax.numpy.asarray, head))

    return make


def replay() -> Make:
    def make(target: Target) -> Example:
        recording = Recording.create(target.written, wrong_rate=0.2)
        return Example(Replay(4, target.model.config.vocab_size), recording, has_rows=True)

    return make


def last_successor() -> Make:
    method = OUTSIDE["drafters"]["last_successor"]
    return lambda target: Example(method(3, target.model.config.vocab_size))
