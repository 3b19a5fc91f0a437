"""Heads on the target's last hidden state guess the tokens further on; a fixed tree combines their guesses.

Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774. The forward that
verifies one tree gives the hidden state from which the next one is guessed, so drafting costs the heads alone, and no
cache of its own.

Departs from the paper: heads may share the model's own output matrix (`tied`), which leaves a few ten thousand numbers
per head to train and to store. The first round of a row drafts nothing, as reading a prompt keeps no hidden state.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.decoding.drafters._contract import Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.drafters._guesses import best_guesses, sibling_ranks, tree_tokens
from decodax.decoding.drafters._size import set_tree
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.layers import pytree
from decodax.layers.linear import linear
from decodax.models.model import Model, Params


@dataclass(frozen=True)
class MedusaShape:
    """heads: K, head k (from 0) guesses k + 2 tokens behind the token whose hidden state it reads. blocks: residual
    ones per head. tied: all heads end in the model's own output matrix; otherwise each has one of its own.

    Raises ValueError for fewer than one head or block.
    """

    heads: int = 4
    blocks: int = 1
    tied: bool = True

    def __post_init__(self) -> None:
        if self.heads < 1 or self.blocks < 1:
            raise ValueError(f"heads and blocks must be at least 1, got {self.heads} and {self.blocks}")


def initial_heads(target_params: Params, shape: MedusaShape) -> Params:
    """Heads that all say what the model's own head says: blocks of zeros, output matrices copied from the model.

    {"head_0": {"block_0": {"weight": [D, D], "bias": [D]}, ..., "out": [V, D] unless tied}, ...}, float32.
    """
    output = target_params.get("head", target_params["embedding"]).astype(jnp.float32)
    width = output.shape[1]

    def head() -> Params:
        blocks: Params = {
            f"block_{index}": {"weight": jnp.zeros((width, width)), "bias": jnp.zeros(width)}
            for index in range(shape.blocks)
        }
        return blocks if shape.tied else blocks | {"out": output.copy()}

    return {f"head_{index}": head() for index in range(shape.heads)}


def head_logits(
    model: Model, target_params: Params, heads: Params, normed: Float[Array, "B T D"], count: int
) -> Float32[Array, "B A T V"]:
    """What the first `count` heads (A of them) make of hidden states that have passed the final norm (`model.normed`).

    Head k: x_0 = normed, x_(i+1) = x_i + SiLU(W_i x_i + b_i) for each block, logits = output matrix x x_last.
    """
    ends = []
    for index in range(count):
        head, state = heads[f"head_{index}"], normed
        for block in range(sum(name.startswith("block_") for name in head)):
            weights = head[f"block_{block}"]
            state = state + jax.nn.silu(linear(state, weights["weight"], weights["bias"]))
        ends.append(state)
    if "out" in heads["head_0"]:
        outputs = [heads[f"head_{index}"]["out"] for index in range(count)]
        logits = [linear(end, out, output_dtype=jnp.float32) for end, out in zip(ends, outputs, strict=True)]
        return jnp.stack(logits, axis=1)
    batch, length, _ = normed.shape
    read = model.read_out(target_params, jnp.concatenate(ends, axis=1))
    return read.reshape(batch, count, length, -1)


@pytree.dataclass
class Guesses:
    """token[b, d, r]: the r-th guess at the token d + 1 behind the pending one. is_possible: false before the first."""

    token: Int[Array, "B A R"]
    is_possible: Bool[Array, "B A R"]


@dataclass(frozen=True)
class MedusaHeads(Drafter):
    """A tree in which every node at depth d takes one of the guesses of head d - 1; `draft_params` are the heads.

    model: the target. parents: of each node, the root's -1 (`decoding/tree_choice.py` chooses them); siblings take the
    guesses in the order of their likelihood. Keeps `Guesses`.
    Raises ValueError for a tree of the root alone, and where the heads do not fit the target or are fewer than the
    tree is deep.
    """

    model: Model
    parents: tuple[int, ...]
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    trained_part = "heads on the last hidden state: `decodax train medusa`"

    def __post_init__(self) -> None:
        set_tree(self, self.parents)

    @property
    def ranks(self) -> Int[np.ndarray, " C"]:
        return sibling_ranks(self.parents)

    def check(self, model: Model, draft_params: Any) -> None:
        if self.model.config != model.config:
            raise ValueError("MedusaHeads must be made with the target that they draft for, got another model")
        most, vocab_size = int(self.ranks.max()) + 1, model.config.vocab_size
        if most > vocab_size:
            raise ValueError(f"a node can have at most {vocab_size} children (the vocabulary), got {most}")
        check_heads(model, draft_params)
        if self.max_depth > len(draft_params):
            raise ValueError(
                f"a tree can be as deep as there are heads, {len(draft_params)}, got depth {self.max_depth}: choose a "
                "flatter tree or train more heads"
            )

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> Guesses:
        shape = (state.tokens.shape[0], self.max_depth, int(self.ranks.max()) + 1)
        return Guesses(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, Guesses]:
        tree, pending, rank = Tree.fixed(self.parents), state.pending(), self.ranks[None]
        token = tree_tokens(state.draft.token, pending, tree.depth, rank)
        possible = tree_tokens(state.draft.is_possible.astype(jnp.int32), pending, tree.depth, rank) > 0
        return fixed_proposal(tree, token, possible, forwards=1), state.draft

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> Guesses:
        """Guesses behind the new pending token: that token's own hidden state is not there yet, and heads skip it."""
        last = jnp.maximum(outcome.num_emitted - 1, 0)[:, None]
        node = jnp.take_along_axis(outcome.path, last, axis=1)  # the last token that was run and stands
        hidden = jnp.take_along_axis(outcome.forward.hidden, node[:, :, None], axis=1)
        normed = self.model.normed(params, hidden)
        logits = head_logits(self.model, params, draft_params, normed, self.max_depth)[:, :, 0]
        old = state.draft
        token, is_possible = best_guesses(logits, old.token.shape[2])
        is_new = (outcome.num_emitted > 0)[:, None, None]
        return Guesses(jnp.where(is_new, token, old.token), jnp.where(is_new, is_possible, old.is_possible))


def check_heads(model: Model, heads: Any) -> None:
    """Raises ValueError where these are no heads for this model."""
    width, vocab_size = model.config.hidden_size, model.config.vocab_size
    if not isinstance(heads, dict) or not heads or any(f"head_{index}" not in heads for index in range(len(heads))):
        raise ValueError('Medusa heads must be {"head_0": ..., "head_1": ...} as `decodax train medusa` makes them')
    for name, head in heads.items():
        blocks = [part for part in head if part.startswith("block_")]
        found = {(*head[part]["weight"].shape, *head[part]["bias"].shape) for part in blocks}
        if found != {(width, width, width)}:
            raise ValueError(
                f"blocks of Medusa heads must have weights [{width}, {width}] and biases [{width}] (the model's hidden "
                f"size), got {sorted(found)} in {name}: were they trained for another model?"
            )
        if ("out" in head) != ("out" in heads["head_0"]) or head.get("out", np.zeros((0, width))).shape[1] != width:
            raise ValueError(f"output matrices must be [{vocab_size}, {width}] for all heads or for none: see {name}")
        if "out" in head and head["out"].shape[0] != vocab_size:
            raise ValueError(
                f"output matrices of Medusa heads must have the model's vocabulary of {vocab_size} tokens, got "
                f"{head['out'].shape[0]} in {name}"
            )
