"""Medusa heads: residual blocks on the last hidden state, each of which predicts the token a step further on.

Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads, arXiv 2401.10774. Departs from the
paper: heads may share the model's own output matrix (`tied`), which leaves a few ten thousand numbers per head to train
and to store.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from decodax.core.linear import linear
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
    if "head_projection" in target_params:
        output = output @ target_params["head_projection"].astype(jnp.float32)
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
