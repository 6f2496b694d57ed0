"""What devices send each other is the same whatever carries it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.ops.collectives import all_gather, gather_over, scatter_sum, sum_over

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


@pytest.mark.parametrize("devices", [1, 2])
def test_an_axis_of_one_device_has_no_collective(mesh, devices):
    mesh(expert=devices, data=1)
    whole = jnp.arange(64.0).reshape(8, 8)
    axes = ("data", "expert")

    def on_device(whole):
        def loss(whole):
            gathered = gather_over(scatter_sum(whole, axes, 0), axes, 0, "bfloat16")
            return sum_over((gathered + all_gather(whole[:4], axes)[:4].sum()).sum(), axes)

        return jax.grad(loss)(whole)

    run = jax.jit(jax.shard_map(on_device, in_specs=P(), out_specs=P(), check_vma=False))
    text = run.lower(whole).as_text()
    kinds = ("all_gather", "all_reduce", "reduce_scatter")
    assert [kind in text for kind in kinds] == [devices > 1] * 3
