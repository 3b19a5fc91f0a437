"""Places a model's experts on devices by a placement table: on several devices, replicated, or cut into slices."""

from collections.abc import Mapping
from dataclasses import replace

from jax.sharding import Mesh

from decodax.layers.moe.layer import MoEConfig
from decodax.layers.moe.placement import Placement
from decodax.models.model import Model, Params
from decodax.sharding.rules import Rules, place_tree


def place_experts(
    model: Model, params: Params, placement: Placement | Mapping[int, Placement], mesh: Mesh, rules: Rules
) -> tuple[Model, Params]:
    """The same model with the weights of its experts in the order of the placement's slots, all weights on the mesh.

    model, params: the model without a placement.
    placement: of every layer with experts, or of each by its number.
    mesh: for all weights.
    rules: with a pair ("E", a mesh axis, or several), over whose devices the slots are sharded.
    Raises ValueError for a placement of another number of experts or devices, and for a layer without one.
    """
    sparse = [
        index for index, block in enumerate(model.config.blocks) if isinstance(block.feed_forward_layer, MoEConfig)
    ]
    placements = dict.fromkeys(sparse, placement) if isinstance(placement, Placement) else dict(placement)
    if set(placements) != set(sparse):
        raise ValueError(f"layers {sparse} have experts and need a placement each, got them for {sorted(placements)}")
    execution = replace(model.execution, mesh=mesh, rules=rules)
    num_devices = execution.num_shards("E")
    blocks, params = list(model.config.blocks), dict(model.unstacked(params))
    for index, table in placements.items():
        if table.num_devices != num_devices:
            raise ValueError(
                f"layer {index}: the rules split experts over {num_devices} devices of the mesh, and its placement is "
                f"for {table.num_devices}"
            )
        sub_layer = blocks[index].feed_forward
        assert sub_layer is not None  # it has experts
        mixture = sub_layer.layer
        if mixture.placement is not None:
            raise ValueError(f"layer {index} has a placement already: restore its weights first (Placement.restore)")
        blocks[index] = replace(blocks[index], feed_forward=replace(sub_layer, layer=replace(mixture, placement=table)))
        own = params[f"blocks_{index}"]
        experts = table.arrange(own["feed_forward"]["experts"])
        params[f"blocks_{index}"] = {**own, "feed_forward": {**own["feed_forward"], "experts": experts}}
    placed = replace(model, config=replace(model.config, blocks=tuple(blocks)), execution=execution)
    return placed, place_tree(mesh, rules, placed.stacked(params), placed.weights())
