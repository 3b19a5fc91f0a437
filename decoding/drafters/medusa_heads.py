"""Drafts with Medusa heads on the target's last hidden state; a fixed tree combines their top-k tokens.

Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774. The forward that
verifies one tree gives the hidden state for the next one, so drafting costs the heads alone, and needs no cache of its
own.

Departs from the paper: heads may share the model's own output matrix (`tied`), which leaves a few ten thousand numbers
per head to train and to store. The first round of a row drafts nothing, as prefill keeps no hidden state.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from decodax.core import pytree
from decodax.core.linear import linear
from decodax.decoding.drafters._size import set_tree
from decodax.decoding.drafters.contract import Drafter, Outcome, Proposal, fixed_proposal
from decodax.decoding.ranked_tokens import sibling_ranks, top_k_per_distance, tree_tokens
from decodax.decoding.state import DecodeState
from decodax.decoding.tree import Tree
from decodax.models.model import Model, Params


@dataclass(frozen=True)
class MedusaShape:
    """The shape of Medusa heads.

    heads: K; head k (from 0) predicts the token k + 2 positions after the one whose hidden state it reads.
    blocks: residual blocks per head.
    tied: all heads share the model's own output matrix; otherwise each has its own.

    Raises ValueError for fewer than one head or block.
    """

    heads: int = 4
    blocks: int = 1
    tied: bool = True

    def __post_init__(self) -> None:
        if self.heads < 1 or self.blocks < 1:
            raise ValueError(f"heads and blocks must be at least 1, got {self.heads} and {self.blocks}")


def initial_heads(target_params: Params, shape: MedusaShape) -> Params:
    """Heads that all predict what the model's own head does: blocks of zeros, output matrices copied from the model.

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
    """Logits of the first `count` heads (A of them).

    Head k: x_0 = normed, x_(i+1) = x_i + SiLU(W_i x_i + b_i) for each block, logits = output matrix x x_last.

    heads: the heads' weights.
    normed: hidden states after the final norm (`model.normed`).
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
class RankedTokens:
    """The drafter's state.

    token[b, d, r]: the r-th most probable token at distance d + 1 after the last one.
    is_possible: false before the first.
    """

    token: Int[Array, "B A R"]
    is_possible: Bool[Array, "B A R"]


@dataclass(frozen=True)
class MedusaHeads(Drafter):
    """A tree in which every node at depth d is one of the top-k tokens of head d - 1; `draft_params` are the heads.

    Its state is `RankedTokens`.

    model: the target.
    parents: of each node, -1 for the root (`decoding/tree_choice.py` chooses them); siblings are in order of
        probability.
    Raises ValueError for a tree of the root alone, and where the heads do not fit the target or are fewer than the
    tree is deep.
    """

    model: Model
    parents: tuple[int, ...]
    num_nodes: int = field(init=False)
    max_depth: int = field(init=False)

    auxiliary_weights = "heads on the last hidden state: `decodax train medusa`"

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

    def start(self, params: Any, draft_params: Any, state: DecodeState) -> RankedTokens:
        shape = (state.tokens.shape[0], self.max_depth, int(self.ranks.max()) + 1)
        return RankedTokens(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))

    def propose(self, params: Any, draft_params: Any, state: DecodeState) -> tuple[Proposal, RankedTokens]:
        tree, last_token, rank = Tree.fixed(self.parents), state.last_token(), self.ranks[None]
        token = tree_tokens(state.draft.token, last_token, tree.depth, rank)
        possible = tree_tokens(state.draft.is_possible.astype(jnp.int32), last_token, tree.depth, rank) > 0
        return fixed_proposal(tree, token, possible, forwards=1), state.draft

    def update(self, params: Any, draft_params: Any, state: DecodeState, outcome: Outcome) -> RankedTokens:
        """The tokens after the new last token, from the state before it: its own hidden state is not known yet."""
        last = jnp.maximum(outcome.num_emitted - 1, 0)[:, None]
        node = jnp.take_along_axis(outcome.path, last, axis=1)  # the last token that was run and accepted
        hidden = jnp.take_along_axis(outcome.forward.hidden, node[:, :, None], axis=1)
        normed = self.model.normed(params, hidden)
        logits = head_logits(self.model, params, draft_params, normed, self.max_depth)[:, :, 0]
        old = state.draft
        token, is_possible = top_k_per_distance(logits, old.token.shape[2])
        is_new = (outcome.num_emitted > 0)[:, None, None]
        return RankedTokens(jnp.where(is_new, token, old.token), jnp.where(is_new, is_possible, old.is_possible))


def check_heads(model: Model, heads: Any) -> None:
    """Raises ValueError where these are not Medusa heads for this model."""
    width, vocab_size = model.config.hidden_size, model.config.vocab_size
    if not isinstance(heads, dict) or not heads or any(f"head_{index}" not in heads for index in range(len(heads))):
        raise ValueError('Medusa heads must be {"head_0": ..., "head_1": ...} as `decodax train medusa` makes them')
    for name, head in heads.items():
        blocks = [block for block in head if block.startswith("block_")]
        found = {(*head[block]["weight"].shape, *head[block]["bias"].shape) for block in blocks}
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
