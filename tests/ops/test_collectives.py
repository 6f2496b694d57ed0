"""What devices send each other is the same whatever carries it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.ops.collectives import scatter_sum

DEVICES = 4


def scattered(whole, dim):
    """Each device's part of the sum of all devices' arrays, one after the other."""
    with jax.set_mesh(jax.make_mesh((DEVICES,), ("x",), devices=jax.devices()[:DEVICES])):
        whole = jax.reshard(whole, P("x"))

        def own(whole):
            return scatter_sum(whole[0], "x", dim)[None]

        found = jax.jit(jax.shard_map(own, out_specs=P("x"), check_vma=False))
        return found.lower(whole).compile().as_text(), np.asarray(found(whole))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_device_gets_its_part_of_the_sum(dim, processes, monkeypatch):
    whole = jnp.arange(DEVICES * 8 * 12 * 4, dtype=jnp.float32).reshape(DEVICES, 8, 12, 4)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    text, found = scattered(whole, dim)
    # The reduce-scatter between processes on CPUs is wrong at times.
    assert ("reduce-scatter" in text) == (processes == 1)
    parts = np.split(np.asarray(whole).sum(0), DEVICES, axis=dim)
    np.testing.assert_array_equal(found, np.stack(parts))
