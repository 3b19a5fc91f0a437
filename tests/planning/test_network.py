"""The cost of collectives follows from hops and bytes, by hand and by simulation from chip to chip."""

import pytest

from decodax.planning.chips import V5E, V5P
from decodax.planning.network import Ring, Switch, Torus

TORUS = Torus(link_bandwidth=50e9, hop_seconds=1e-6, wraps_at=16)


def rounds_until_all_have_all(ring):
    """The number of rounds in which chips pass all they have to their neighbours, until each has everything."""
    known = [{chip} for chip in range(ring.length)]
    count = 0
    while any(len(some) < ring.length for some in known):
        ends = range(ring.length) if ring.wraps else range(1, ring.length)
        pairs = [((chip - 1) % ring.length, chip) for chip in ends]
        after = [set(some) for some in known]
        for left, right in pairs:
            after[left] |= known[right]
            after[right] |= known[left]
        known, count = after, count + 1
    return count


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("length", [2, 3, 4, 7, 16])
def test_hops_of_a_gather(length, wraps):
    ring = Ring(length, wraps)
    assert ring.hops == rounds_until_all_have_all(ring)
    assert TORUS.seconds("all-gather", 1, (ring,)) == pytest.approx(ring.hops * 1e-6)
    assert TORUS.seconds("all-reduce", 1, (ring,)) == pytest.approx(2 * ring.hops * 1e-6)


def test_bytes_of_a_gather_by_hand():
    """A gigabyte over a line of 4 v5e: three quarters of it arrive through the one link of an end chip."""
    line, ring = Ring(4, False), Ring(16, True)
    assert TORUS.seconds("all-gather", 1e9, (line,)) == pytest.approx(0.75e9 / 50e9)
    assert TORUS.seconds("all-gather", 1e9, (ring,)) == pytest.approx(1e9 * 15 / 16 / 100e9)  # two links
    assert TORUS.seconds("all-gather", 1e9, (ring, ring)) == pytest.approx(1e9 * 255 / 256 / 200e9)
    assert TORUS.seconds("all-reduce", 1e9, (line,)) == pytest.approx(2 * 0.75e9 / 50e9)


def test_exchanges_cross_the_middle():
    """Each of 4 chips of a line sends a gigabyte: half of what the left two send crosses one link to the right."""
    assert TORUS.seconds("all-to-all", 1e9, (Ring(4, False),)) == pytest.approx(2 * 0.5e9 / 50e9)
    assert TORUS.seconds("all-to-all", 1e9, (Ring(16, True),)) == pytest.approx(8 * 0.5e9 / (2 * 50e9))


def test_the_books_own_examples():
    """ "How to Scale Your Model", part 3: v4p, 4 x 4 x 4, 4.5e10 bytes per second one way (questions 2 and 3)."""
    v4p, ring = Torus(4.5e10, 1e-6, wraps_at=4), Ring(4, True)
    num_bytes = 2 * 1024 * 4096 / 4  # [B, D_Y] gathered over X
    assert v4p.seconds("all-gather", num_bytes, (ring,)) == pytest.approx(
        23e-6 * 3 / 4, rel=0.03
    )  # the book counts own bytes
    assert v4p.seconds("all-gather", 256, (ring,)) == pytest.approx(2e-6)


def test_a_switch_is_nccls_ring():
    nvlink = Switch(bandwidth=450e9, launch_seconds=3.6e-6, step_seconds=0.47e-6)
    rings = (nvlink.ring(8, True),)
    assert nvlink.seconds("all-reduce", 0, rings) == pytest.approx(3.6e-6 + 14 * 0.47e-6)
    assert nvlink.seconds("all-gather", 9e9, rings) == pytest.approx(9e9 * 7 / 8 / 450e9, rel=1e-3)
    assert nvlink.seconds("all-reduce", 9e9, (nvlink.ring(2, True), nvlink.ring(4, True))) == pytest.approx(
        2 * 9e9 * 7 / 8 / 450e9, rel=1e-3
    )


@pytest.mark.parametrize("network", [V5E.network, Switch(1e9, 1e-6, 1e-6)])
def test_one_device_needs_no_collective(network):
    for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        assert network.seconds(kind, 1e9, (network.ring(1, True),)) == 0


def test_where_a_torus_wraps():
    assert V5E.network.ring(16, True).wraps and not V5E.network.ring(8, True).wraps
    assert V5P.network.ring(4, True).wraps and V5P.network.ring(8, True).wraps and not V5P.network.ring(2, True).wraps
    assert not V5P.network.ring(4, False).wraps  # a fraction of an axis
