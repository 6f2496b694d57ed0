"""Meshes over several slices: only `replica` crosses from one to another."""

from types import SimpleNamespace

import numpy as np
import pytest

from k2jax.config import MESH_AXES, ConfigError, MeshConfig
from k2jax.sharding.mesh import across, slices


def devices(*sizes: int, platform: str = "tpu") -> list[SimpleNamespace]:
    """So many devices of each slice, in the order of their ids, slices mixed."""
    order = [(at, slice_) for slice_, size in enumerate(sizes) for at in range(size)]
    return [
        SimpleNamespace(
            id=number,
            slice_index=slice_,
            platform=platform,
            device_kind="of a test",
            process_index=number,
            coords=(at & 1, at >> 1 & 1, at >> 2),
            core_on_chip=0,
        )
        for number, (at, slice_) in enumerate(sorted(order))
    ]


@pytest.mark.parametrize("replica", [2, 4])
def test_each_slice_is_a_stretch_of_replica_and_every_other_axis_stays_inside(replica):
    mesh = MeshConfig(replica=replica, data=2, expert=4 // replica, model=2)
    found = across(devices(8, 8), mesh)
    assert found.shape == mesh.shape
    slice_of = np.vectorize(lambda device: device.slice_index)(found)
    for place in range(replica):
        assert (slice_of[place] == place // (replica // 2)).all()
    assert len({device.id for device in found.flat}) == 16
    assert MESH_AXES[0] == "replica"


def test_a_replica_axis_that_the_slices_do_not_divide_is_refused():
    with pytest.raises(ConfigError) as error:
        across(devices(4, 4), MeshConfig(data=8))
    assert str(error.value) == (
        "mesh.replica is 1; there are 2 slices and only replica runs across them:"
        " set it to 2 or another multiple of 2"
    )


def test_a_mesh_that_takes_part_of_a_slice_is_refused():
    with pytest.raises(ConfigError, match="takes 4 devices of slice 0, 2 devices of slice 1"):
        across(devices(4, 2), MeshConfig(replica=2, data=3))


def test_nodes_of_gpus_are_no_slices():
    assert list(slices(devices(4, 4, platform="gpu"))) == [0]
    assert list(slices(devices(4, 4))) == [0, 1]
