"""Where a mesh lies on a torus."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from k2jax.config import MESH_AXES, MeshConfig
from k2jax.sharding import torus
from k2jax.sharding.mesh import across


def chips(*shape: int, cores: int = 1) -> list[SimpleNamespace]:
    """Devices of a whole torus, hosts of 2 x 2 chips one after the other as libtpu lists them."""
    places = sorted(np.ndindex(shape), key=lambda at: (*(x // 2 for x in at[::-1]), at))
    return [
        SimpleNamespace(platform="tpu", slice_index=0, coords=list(at), core_on_chip=core)
        for at in places
        for core in range(cores)
    ]


def box(devices: np.ndarray) -> tuple[int, ...]:
    """Chips along each dim that the devices span."""
    places = np.array([device.coords for device in devices.flat])
    return tuple(places.max(axis=0) - places.min(axis=0) + 1)


def test_experts_take_short_dims_whole():
    mesh = MeshConfig(data=8, expert=128)
    found = across(chips(8, 8, 16), mesh)[0, :, :, 0, 0]
    assert all(box(experts) == (8, 8, 2) for experts in found)
    assert box(found[:, 0]) == (1, 1, 15)  # data: every other plane


def test_every_device_is_taken_once_and_a_chip_is_not_split():
    mesh = MeshConfig(data=4, expert=64, model=2)
    found = across(chips(4, 8, 8, cores=2), mesh)
    assert len({(*device.coords, device.core_on_chip) for device in found.flat}) == 512
    assert all(pair[0].coords == pair[1].coords for pair in found.reshape(-1, 2))


@pytest.mark.parametrize(
    "sizes", [{"data": 16, "expert": 32, "model": 2}, {"data": 4, "expert": 2}]
)
def test_meshes_whose_axes_are_no_products_of_dims_lie_too(sizes):
    mesh = MeshConfig(**sizes)
    shape = (8, 8, 16) if mesh.devices == 1024 else (2, 4)
    assert across(chips(*shape), mesh).shape == mesh.shape


def test_chips_that_fill_no_box_keep_the_order_they_are_given_in():
    some = chips(4, 4)[1:7]  # within 4 x 2
    found = across(some, MeshConfig(data=3, expert=2))
    assert list(found.flat) == some


def test_a_ring_has_two_links_a_line_one_and_strides_share():
    def ways(axes, mesh, everyone):
        return torus.links(axes, mesh, (16, 8, 8), 1, everyone)

    mesh = MeshConfig(data=16, expert=8, model=8)
    assert ways(["model"], mesh, False) == 2
    assert ways(["expert", "model"], mesh, False) == 4
    assert ways(["model"], mesh, True) == 1  # a byte travels two links on average, either way
    assert ways(["data"], mesh, True) == 0.5
    half = MeshConfig(data=32, expert=8, model=4)
    assert ways(["model"], half, False) == 1
    assert ways(["expert"], half, False) == 1 + 1 / 2  # a line of 4, and 2 that skip 3: a ring
    assert math.isinf(ways(["context"], half, True))
    assert torus.links(["model"], MeshConfig(data=4, model=2), (4,), 2, False) == math.inf


def test_v6e_closes_in_rings_at_16_chips_only_and_small_cubes_do_not():
    assert torus.rings((8, 16, 4)) == {0, 1, 2}
    assert torus.rings((2, 2, 4)) == set()
    assert torus.rings((8, 16)) == torus.rings((8, 16, 1)) == {1}
    assert torus.rings((4, 8)) == set()


def steps_along(start: int, end: int, size: int, ring: bool) -> list[tuple[int, int, float]]:
    """Directions (0: up), steps and share of the short way; both ways where they are equal."""
    up = end - start
    if not up:
        return []
    if not ring:
        return [(int(up < 0), abs(up), 1.0)]
    ways = [(0, up % size), (1, -up % size)]
    shortest = min(steps for _, steps in ways)
    chosen = [way for way in ways if way[1] == shortest]
    return [(direction, steps, 1 / len(chosen)) for direction, steps in chosen]


def busiest(shape: tuple[int, ...], groups: np.ndarray) -> float:
    """Bytes over the busiest link, one way, when each device of a group sends every other one 1.

    One dim after the other, the short way round.

    Args:
        shape: chips along each dim.
        groups: [groups, members, dims], where each chip lies.
    """
    closed = torus.rings(shape)
    load = np.zeros((*shape, len(shape), 2))
    for members in groups:
        for start, end in itertools.product(members, members):
            at = list(start)
            for dim, size in enumerate(shape):
                for direction, steps, share in steps_along(at[dim], end[dim], size, dim in closed):
                    for step in range(steps):
                        place = at.copy()
                        place[dim] = (at[dim] + (step, -step)[direction]) % size
                        load[(*place, dim, direction)] += share
                at[dim] = end[dim]
    return float(load.max())


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((4, 4, 4), {"data": 8, "expert": 8}),
        ((4, 4, 8), {"data": 4, "expert": 32}),
        ((4, 4, 4), {"data": 4, "expert": 16}),
        ((4, 4, 8), {"data": 8, "expert": 16}),
        ((4, 4, 8), {"data": 16, "expert": 8}),
        ((4, 4, 4), {"data": 2, "expert": 8, "model": 4}),
        ((4, 4, 8), {"data": 2, "expert": 32, "context": 2}),
        ((2, 4, 4), {"data": 2, "expert": 16}),
        ((2, 2, 4), {"data": 2, "expert": 8}),
        ((4, 8), {"data": 2, "expert": 16}),
        ((8, 8), {"data": 2, "expert": 32}),
        ((8, 16), {"data": 4, "expert": 32}),
        ((8, 16), {"data": 16, "expert": 8}),
    ],
)
def test_links_of_an_exchange_are_those_of_routing_every_byte(shape, sizes):
    mesh = MeshConfig(**sizes)
    routed = {}
    for dims in itertools.permutations(range(len(shape))):
        laid = tuple(shape[dim] for dim in dims)
        places = np.stack(np.unravel_index(np.arange(mesh.devices), laid), axis=-1)
        places = places[:, np.argsort(dims)].reshape(*mesh.shape, len(shape))
        expert = MESH_AXES.index("expert")
        groups = np.moveaxis(places, expert, -2).reshape(-1, mesh.expert, len(shape))
        routed[dims] = busiest(shape, groups)
        planned = mesh.expert / torus.links(["expert"], mesh, laid, 1, True)
        assert planned == pytest.approx(routed[dims])
    assert routed[torus.order(shape, mesh)] == min(routed.values())
