"""Expert placements refuse bad tables, reorder weights, and map tokens to slots."""

import jax.numpy as jnp
import numpy as np
import pytest

from decodax.layers.moe.placement import Placement

SHAPES = {"gate": (12, 7), "up": (12, 7), "down": (7, 12), "gate_bias": (12,), "up_bias": (12,), "down_bias": (7,)}


def random_weights(num_experts):
    random = np.random.default_rng(0)
    return {name: random.standard_normal((num_experts, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def test_contiguous_leaves_weights_as_they_are():
    placement, weights = Placement.contiguous(6, 3), random_weights(6)
    assert placement.num_slots == 6 and hash(placement) == hash(Placement.contiguous(6, 3))
    for name, weight in placement.arrange(weights).items():
        np.testing.assert_array_equal(weight, weights[name])


def test_copies_and_empty_slots():
    placement = Placement(3, 2, 3, (((1, 2),), ((0, 1), (1, 0)), ((0, 0),)))
    weights = random_weights(3)
    arranged = placement.arrange(weights)
    for name, weight in weights.items():
        nothing = np.zeros_like(weight[0])
        wanted = np.stack([weight[2], weight[1], nothing, weight[1], nothing, weight[0]])
        np.testing.assert_array_equal(arranged[name], wanted)
        np.testing.assert_array_equal(placement.restore(arranged)[name], weight)
    expert = jnp.asarray([[1, 0], [1, -1], [2, 1], [0, 1]], jnp.int32)
    gate = jnp.asarray(np.arange(8.0).reshape(4, 2), jnp.float32)
    slot, same_gate = placement.assign(expert, gate)
    assert slot.tolist() == [[1, 5], [3, -1], [0, 1], [5, 3]]  # expert 1 by turns in slots 1 and 3
    np.testing.assert_array_equal(same_gate, gate)


def test_outputs_of_slices_add_up():
    """Slice i of expert e has rows i F/s .. of gate and up, the same columns of down, and one has down's bias."""
    placement, weights = Placement.contiguous(2, 4, slices=4), random_weights(2)
    assert placement.slots_per_device == 2
    arranged = {name: np.asarray(weight) for name, weight in placement.arrange(weights).items()}
    for expert in range(2):
        for index in range(4):
            slot, features = expert * 4 + index, slice(3 * index, 3 * index + 3)
            for name in ("gate", "up", "gate_bias", "up_bias"):
                np.testing.assert_array_equal(arranged[name][slot], weights[name][expert][features])
            np.testing.assert_array_equal(arranged["down"][slot], weights["down"][expert][:, features])
            np.testing.assert_array_equal(arranged["down_bias"][slot], weights["down_bias"][expert] * (index == 0))
    for name, weight in placement.restore(arranged).items():
        np.testing.assert_array_equal(weight, weights[name])
    slot, gate = placement.assign(jnp.asarray([[1], [-1]], jnp.int32), jnp.asarray([[0.5], [2.0]]))
    assert slot.tolist() == [[4, 5, 6, 7], [-1] * 4] and gate[0].tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Placement(3, 1, 3, (((0, 0),), (), ((0, 2),))), r"expert 1 must have at least one \(device, slot\)"),
        (lambda: Placement(1, 2, 1, (((0, 0),), ()), slices=2), "slice 1 of expert 0 must have at least one"),
        (lambda: Placement(2, 1, 2, (((0, 0),),)), r"one entry per expert and slice \(2 x 1\), got 1"),
        (lambda: Placement(2, 2, 1, (((0, 0),), ((1, 1),))), r"expert 1: .* within 2 devices of 1 slots, got \(1, 1\)"),
        (lambda: Placement(2, 2, 1, (((0, 0),), ((-1, 0),))), r"got \(-1, 0\)"),
        (lambda: Placement(2, 2, 1, (((0, 0),), ((0, 0),))), "slot 0 must hold one expert, got expert 0 and expert 1"),
        (lambda: Placement(1, 2, 1, (((0, 0), (0, 0)),)), "slot 0 must hold one expert, got expert 0 and expert 0"),
        (lambda: Placement.contiguous(3, 8), "8 devices are more than 3 experts x 1 slices: .* slices=3"),
        (lambda: Placement.contiguous(2, 2, 5).arrange(random_weights(2)), "12 features do not divide into 5 slices"),
    ],
)
def test_bad_tables(make, words):
    with pytest.raises(ValueError, match=words):
        make()
