"""Which parts of a batch each process feeds, however its devices lie on the mesh."""

from types import SimpleNamespace

import numpy as np
import pytest

from k2jax.sharding.rules import Share, share

MESH = (1, 2, 2, 1, 2)  # replica, data, expert, context, model


def mesh(owners: list[int], shape=MESH) -> np.ndarray:
    found = np.empty(len(owners), object)
    found[:] = [SimpleNamespace(process_index=owner) for owner in owners]
    return found.reshape(shape)


def test_processes_in_a_row_take_parts_in_a_row():
    devices = mesh([0, 0, 1, 1, 2, 2, 3, 3])
    assert [share(devices, i) for i in range(4)] == [Share([i], 4, [True]) for i in range(4)]


def test_a_process_may_have_parts_that_are_not_adjacent():
    devices = mesh([0, 0, 1, 1, 0, 0, 1, 1])
    assert share(devices, 0) == Share([0, 2], 4, [True, True])
    assert share(devices, 1) == Share([1, 3], 4, [True, True])


def test_processes_along_model_share_a_part_and_the_first_one_counts_it():
    devices = mesh([0, 1, 0, 1, 2, 3, 2, 3])
    assert share(devices, 0) == Share([0, 1], 4, [True, True])
    assert share(devices, 1) == Share([0, 1], 4, [False, False])
    assert share(devices, 3) == Share([2, 3], 4, [False, False])


@pytest.mark.parametrize("seed", range(5))
def test_every_part_is_fed_and_counted_once_for_any_order(seed):
    owners = np.random.default_rng(seed).permutation(np.arange(8) // 2).tolist()
    shares = [share(mesh(owners), i) for i in range(4)]
    counted = [p for s in shares for p, first in zip(s.parts, s.first, strict=True) if first]
    assert sorted(counted) == [0, 1, 2, 3]
    for number, held in enumerate(shares):
        rows = mesh(owners).reshape(4, 2)
        assert held.parts == [
            p for p in range(4) if number in {device.process_index for device in rows[p]}
        ]
