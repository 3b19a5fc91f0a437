"""Trees against chains of as many nodes: what does a forward over n drafted tokens bring, by the shape of the draft?

A tree's shape is chosen for each n by `best_tree`, from how often a node's first, second, ... child is accepted. That
is measured on text of the training split, each position behind the text itself, and never on what is judged here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from decodax.decoding.drafters import Children, DraftModel
from decodax.decoding.training.distillation import window_logits
from decodax.decoding.tree import Tree
from decodax.decoding.tree_choice import best_tree, expected_tokens
from decodax.decoding.verifiers import METHODS as VERIFIERS
from decodax.scripts import _bench_common as common
from decodax.scripts._bench_runs import Runner, Scheme, row_rounds
from decodax.scripts._bench_schemes import busy
from decodax.scripts._bench_world import World, deal

RANKS = 8  # children of a node that are considered
POSITIONS = 128  # of a batch of windows whose laws are looked at together
# Per temperature: what is drawn, as (how the children come about, verifier, whether it is a tree).
SHAPES = {
    0.0: {"chain": (Children.INDEPENDENT, "exact_match", False), "tree": (Children.CHOSEN, "exact_match", True)},
    1.0: {
        "chain": (Children.INDEPENDENT, "chain_rejection", False),
        "tree without replacement": (Children.WITHOUT_REPLACEMENT, "tree_rejection_without_replacement", True),
        "tree of the likeliest": (Children.CHOSEN, "exact_match", True),
    },
}


@dataclasses.dataclass(frozen=True)
class TreeSetting:
    """nodes: drafted tokens per round, n. rows: prompts."""

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

    Greedy: the target's likeliest token is the draft's r-th. Else, for the likeliest children, the target's probability
    of the r-th; for children drawn without replacement, one draw of them per position and the chance that the rule of
    `tree_rejection_without_replacement` passes the earlier ones over and takes the r-th.
    """
    if greedy or kind is Children.CHOSEN:
        _, order = jax.lax.top_k(draft, RANKS)
        if greedy:
            return jnp.mean((order == jnp.argmax(target, axis=1)[:, None]).astype(jnp.float32), axis=0)
        return jnp.mean(jnp.take_along_axis(jax.nn.softmax(target), order, axis=1), axis=0)
    left, law, shares = jax.nn.softmax(target), jax.nn.softmax(draft), []
    reached = jnp.ones(target.shape[0])
    _, order = jax.lax.top_k(draft + jax.random.gumbel(key, draft.shape), RANKS)
    for rank in range(RANKS):
        token = order[:, rank : rank + 1]
        p, q = (jnp.take_along_axis(part, token, axis=1)[:, 0] for part in (left, law))
        chance = jnp.minimum(1.0, p / jnp.maximum(q, 1e-30))
        shares.append(jnp.mean(reached * chance))
        reached = reached * (1 - chance)
        left = _scaled(jnp.maximum(left - law, 0.0))
        law = _scaled(jnp.where(jnp.arange(law.shape[1])[None, :] == token, 0.0, law))
    return jnp.stack(shares)


def _scaled(weights: Float[Array, "I V"]) -> Float[Array, "I V"]:
    return weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1e-30)


def measured_ranks(world: World, chain: Scheme, windows: int) -> dict[tuple[Children, bool], list[float]]:
    """`rank_shares` on text of the training split, for each kind of tree that is drawn here, by (kind, greedy)."""
    assert isinstance(chain.drafter, DraftModel)
    draft = chain.drafter.model
    kinds = [(kind, not heat) for heat, shapes in SHAPES.items() for kind, _, is_tree in shapes.values() if is_tree]

    @jax.jit
    def of_window(target_params: Any, draft_params: Any, tokens: Array, key: Key[Array, ""]) -> list[Array]:
        both = ((world.lm.model, target_params), (draft, draft_params))
        target, drafted = (window_logits(model, params, tokens)[0, -POSITIONS:] for model, params in both)
        return [rank_shares(*kind, target, drafted, key) for kind in kinds]

    found = []
    for index, row in enumerate(busy(list(world.train[:windows]), "acceptance by rank, training split")):
        tokens = jnp.asarray(row[None, :-1])
        found.append(of_window(world.lm.params, chain.draft_params, tokens, jax.random.key(index)))
    return {
        kind: np.mean([np.asarray(one[place]) for one in found], axis=0).tolist() for place, kind in enumerate(kinds)
    }


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
        rounds = sum(row_rounds(one.decode(one.begin(prompts, heat))) for prompts in batches)
        points.append(
            {
                "temperature": heat,
                "shape": name,
                "nodes": nodes,
                "depth": int(Tree.fixed(parents).depth.max()),
                "tokens_per_forward": sum(map(len, batches)) * setting.num_new / rounds,
                "expected_by_the_choice": expected_tokens(acceptance, parents) if is_tree else None,
            }
        )
    keys = ("shape", "nodes", "depth", "tokens_per_forward")
    rows = [[f"{point['temperature']:g}", *(point[key] for key in keys)] for point in points]
    columns = ["temperature", "shape", "drafted tokens", "depth", "tokens per forward"]
    common.print_table("Trees and chains of equal size", columns, rows)
    shares = {f"{kind.value}, {'greedy' if greedy else 'sampled'}": found for (kind, greedy), found in ranks.items()}
    return {"setting": dataclasses.asdict(setting), "rank_acceptance_on_training_text": shares, "points": points}
