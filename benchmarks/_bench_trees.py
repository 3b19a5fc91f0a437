"""Compares trees with chains of as many nodes: tokens per forward over n draft tokens, by the shape of the draft.

A tree's shape is chosen for each n by `best_tree`, from how often a node's first, second, ... child is accepted. That
is never measured on the prompts of this benchmark: for sampling it is measured on text of the training split, each
position after the text itself; for greedy decoding, whose text is unlike that, on what the target itself writes after
pieces of it, where it does not repeat itself.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

import decodax
from benchmarks import _bench_common as common
from benchmarks._bench_repetition import counted, loop_start, summed
from benchmarks._bench_runs import Runner, Scheme
from benchmarks._bench_schemes import busy
from benchmarks._bench_world import World, deal
from decodax.decoding.drafters import Children, DraftModel
from decodax.decoding.training.distillation import window_logits
from decodax.decoding.tree import Tree
from decodax.decoding.tree_choice import best_tree, expected_tokens
from decodax.decoding.verifiers import METHODS as VERIFIERS

RANKS = 8  # children of a node that are considered
POSITIONS = 64  # the last of each text, at which acceptance is measured
# Per temperature: what is measured, as (how the children are chosen, verifier, whether it is a tree).
SHAPES = {
    0.0: {"chain": (Children.INDEPENDENT, "exact_match", False), "tree": (Children.CHOSEN, "exact_match", True)},
    1.0: {
        "chain": (Children.INDEPENDENT, "chain_rejection", False),
        "tree without replacement": (Children.WITHOUT_REPLACEMENT, "tree_rejection_without_replacement", True),
        "tree of the most probable": (Children.CHOSEN, "exact_match", True),
    },
}


@dataclasses.dataclass(frozen=True)
class TreeSetting:
    """The sizes of the runs.

    nodes: draft tokens per round, n.
    rows: prompts.
    windows: of the training split, for the acceptance by rank.
    """

    nodes: tuple[int, ...]
    rows: int
    batch: int
    num_new: int
    capacity: int
    windows: int


def rank_shares(
    kind: Children, greedy: bool, target: Float[Array, "I V"], draft: Float[Array, "I V"], key: Key[Array, ""]
) -> Float[Array, " ranks"]:
    """Share of I positions at which the r-th child of a node is the one that is accepted, for each of RANKS ranks.

    Greedy: the target's most probable token is the draft's r-th. Else, for the most probable children, the target's
    probability of the r-th; for children drawn without replacement, one draw of them per position and the chance that
    the rule of `tree_rejection_without_replacement` rejects the earlier ones and accepts the r-th.
    """
    if greedy or kind is Children.CHOSEN:
        _, order = jax.lax.top_k(draft, RANKS)
        if greedy:
            return jnp.mean((order == jnp.argmax(target, axis=1)[:, None]).astype(jnp.float32), axis=0)
        return jnp.mean(jnp.take_along_axis(jax.nn.softmax(target), order, axis=1), axis=0)
    left, probs, shares = jax.nn.softmax(target), jax.nn.softmax(draft), []
    reached = jnp.ones(target.shape[0])
    _, order = jax.lax.top_k(draft + jax.random.gumbel(key, draft.shape), RANKS)
    for rank in range(RANKS):
        token = order[:, rank : rank + 1]
        p, q = (jnp.take_along_axis(of, token, axis=1)[:, 0] for of in (left, probs))
        chance = jnp.minimum(1.0, p / jnp.maximum(q, 1e-30))
        shares.append(jnp.mean(reached * chance))
        reached = reached * (1 - chance)
        left = _scaled(jnp.maximum(left - probs, 0.0))
        probs = _scaled(jnp.where(jnp.arange(probs.shape[1])[None, :] == token, 0.0, probs))
    return jnp.stack(shares)


def _scaled(weights: Float[Array, "I V"]) -> Float[Array, "I V"]:
    return weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-30)


def own_texts(world: World, windows: int) -> list[Int[np.ndarray, " T"]]:
    """The target's greedy continuations of first halves of training windows, with these, where they do not loop."""
    half = (world.train.shape[1] - 1) // 2
    prompts = [row[:half] for row in world.train[:windows]]
    written = decodax.generate(world.lm, prompts, max_new_tokens=min(half, POSITIONS), stop_token_ids=[]).tokens
    texts = [np.append(row, ids) for row, ids in zip(prompts, written, strict=True) if loop_start(ids) is None]
    if not texts:
        raise ValueError(f"all {windows} continuations repeat themselves: give more windows of the training split")
    return texts


def measured_ranks(world: World, chain: Scheme, windows: int) -> dict[tuple[Children, bool], list[float]]:
    """`rank_shares` for each kind of tree that is measured here, by (kind, greedy)."""
    assert isinstance(chain.drafter, DraftModel)
    draft = chain.drafter.model

    @partial(jax.jit, static_argnums=0)
    def of_text(kind: tuple[Children, bool], params: tuple[Any, Any], tokens: Array, key: Key[Array, ""]) -> Array:
        both = zip((world.lm.model, draft), params, strict=True)
        target, drafted = (window_logits(model, weights, tokens)[0, -POSITIONS:] for model, weights in both)
        return rank_shares(*kind, target, drafted, key)

    texts = {True: own_texts(world, windows), False: list(world.train[:windows])}
    kinds = [(kind, not heat) for heat, shapes in SHAPES.items() for kind, _, is_tree in shapes.values() if is_tree]
    params, shares = (world.lm.params, chain.draft_params), {}
    for kind in kinds:
        found = [
            of_text(kind, params, jnp.asarray(text[None, :-1]), jax.random.key(index))
            for index, text in enumerate(busy(texts[kind[1]], "acceptance by rank, training split"))
        ]
        shares[kind] = np.mean(np.asarray(found), axis=0).tolist()
    return shares


def measure(world: World, setting: TreeSetting, chain: Scheme) -> dict[str, Any]:
    """Tokens per target forward of every shape at every n, on the held-out prompts."""
    assert isinstance(chain.drafter, DraftModel)
    ranks = measured_ranks(world, chain, setting.windows)
    batches = deal(world.prompts[: setting.rows], setting.batch)
    points: list[dict[str, Any]] = []
    cases = [(heat, name, nodes) for heat, shapes in SHAPES.items() for name in shapes for nodes in setting.nodes]
    for heat, name, nodes in busy(cases, "trees and chains"):
        kind, verifier, is_tree = SHAPES[heat][name]
        acceptance = ranks[kind, not heat] if is_tree else []
        parents = best_tree(acceptance, nodes) if is_tree else tuple(range(-1, nodes))
        drafter = DraftModel(chain.drafter.model, parents, kind)
        scheme = Scheme(name, drafter, VERIFIERS[verifier](), chain.draft_params)
        one = Runner(world.lm.model, world.lm.params, scheme, capacity=setting.capacity, num_new=setting.num_new)
        traces = [one.trace(prompts, heat) for prompts in batches]
        whole, loop_free = (
            summed([counted(trace.new, trace.ends, without_loops=left_out) for trace in traces])
            for left_out in (False, True)
        )
        points.append(
            {
                "temperature": heat,
                "shape": name,
                "nodes": nodes,
                "depth": int(Tree.fixed(parents).depth.max()),
                "tokens_per_forward": whole.tokens_per_forward,
                "tokens_per_forward_loop_free": loop_free.tokens_per_forward,
                "expected_by_the_choice": expected_tokens(acceptance, parents) if is_tree else None,
            }
        )
    keys = ("shape", "nodes", "depth", "tokens_per_forward", "tokens_per_forward_loop_free")
    rows = [[f"{point['temperature']:g}", *(point[key] for key in keys)] for point in points]
    columns = ["temperature", "shape", "draft tokens", "depth", "tokens per forward", "loop-free"]
    common.print_table("Trees and chains of equal size", columns, rows)
    shares = {f"{kind.value}, {'greedy' if greedy else 'sampled'}": found for (kind, greedy), found in ranks.items()}
    return {"setting": dataclasses.asdict(setting), "rank_acceptance": shares, "points": points}
