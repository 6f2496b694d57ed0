"""Where a mesh lies on a torus."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from k2jax.config import MeshConfig
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
    some = chips(4, 4)[:6]
    found = across(some, MeshConfig(data=3, expert=2))
    assert list(found.flat) == some


def test_a_ring_has_two_links_a_line_one_and_strides_share():
    ways = lambda axes, mesh, everyone: torus.links(axes, mesh, (16, 8, 8), 1, everyone)
    mesh = MeshConfig(data=16, expert=8, model=8)
    assert ways(["model"], mesh, False) == 2
    assert ways(["expert", "model"], mesh, False) == 4
    assert ways(["model"], mesh, True) == 1  # a byte travels two links on average, either way
    assert ways(["data"], mesh, True) == 0.5
    half = MeshConfig(data=32, expert=8, model=4)
    assert ways(["model"], half, False) == 1
    assert ways(["expert"], half, False) == 1 + 1 / 4  # two lines of 4 chips that skip 3
    assert math.isinf(ways(["context"], half, True))
    assert torus.links(["model"], MeshConfig(data=4, model=2), (4,), 2, False) == math.inf
