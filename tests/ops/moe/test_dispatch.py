"""Every dispatch of tokens gives what running all experts on all tokens gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from k2jax import sharding
from k2jax.config import MeshConfig
from k2jax.ops.moe import (
    Dispatch,
    buffer_rows,
    dispatch_allgather,
    dispatch_alltoall,
    fuse_gate_up,
    reference_expert_mlp,
)

N, D, F, E, K = 32, 6, 5, 8, 2  # tokens of all devices
MESH = MeshConfig(data=2, expert=4)
DISPATCHES = {
    "allgather": lambda *a: (dispatch_allgather(*a), 0.0),
    "alltoall": lambda *a: dispatch_alltoall(*a, Dispatch("alltoall", 2.0)),
    "alltoall in rounds": lambda *a: dispatch_alltoall(*a, Dispatch("alltoall", 0.5)),
    "alltoall_capacity": lambda *a: dispatch_alltoall(*a, Dispatch("alltoall_capacity", 1.0)),
    "alltoall_capacity, with room for all": lambda *a: dispatch_alltoall(
        *a, Dispatch("alltoall_capacity", 4.0)
    ),
}


def choices(case):
    rng = np.random.default_rng(3)

    def pick(pool, n=N):
        return np.stack([rng.permutation(pool)[:K] for _ in range(n)])

    return {
        "random": pick(E),
        "balanced": np.arange(N * K).reshape(N, K) % E,
        "skewed": np.concatenate([pick([0, 1, 2], N - 5), pick(E, 5)]),
        "crowded": np.tile([5, 4], (N, 1)),  # all to the two experts of one device
        "one group idle": np.concatenate([pick(E, N // 2), np.tile([0, 1], (N // 2, 1))]),
    }[case].astype(np.int32)


def drawn():
    rng = np.random.default_rng(1)

    def cast(*shape):
        return jnp.asarray(rng.standard_normal(shape), "float32")

    weight = jnp.asarray(rng.random((N, K)), "float32")
    return cast(N, D), weight, (cast(E, D, F), cast(E, D, F), cast(E, F, D)), cast(N, D)


def differentiated(run):
    @jax.jit
    def both(x, expert, weight, weights, dy):
        def f(x, weight, weights):
            return run(x, expert, weight, fuse_gate_up(*weights))

        (y, dropped), back = jax.vjp(f, x, weight, weights)
        dx, dweight, dweights = back((dy, jnp.zeros_like(dropped)))
        return [y, dx, dweight, *dweights], dropped

    return both


@functools.cache
def compiled(dispatch):
    """On the mesh; `dispatch` sees one device."""
    tokens, experts = P(("data", "expert")), P("expert")

    def one(*args):
        y, dropped = DISPATCHES[dispatch](*args)
        return y, jax.lax.pmean(dropped, ("data", "expert"))

    body = jax.shard_map(
        one,
        in_specs=(tokens, tokens, tokens, (experts,) * 2),
        out_specs=(tokens, P()),
        check_vma=False,
    )
    return differentiated(body)


def on_mesh(dispatch, x, expert, weight, weights, dy):
    """Values and gradients, and the share that was dropped, from arrays on the mesh."""
    with jax.set_mesh(sharding.make_mesh(MESH)):
        mesh = jax.sharding.get_mesh()

        def put(a, spec):
            return jax.device_put(np.asarray(a), jax.NamedSharding(mesh, spec))

        tokens = P(("data", "expert"))
        placed = [put(a, tokens) for a in (x, expert, weight)]
        stacks = tuple(put(a, P("expert")) for a in weights)
        return jax.device_get(compiled(dispatch)(*placed, stacks, put(dy, tokens)))


reference = differentiated(lambda *args: (reference_expert_mlp(*args), jnp.zeros(())))


@pytest.mark.parametrize(
    "dispatch", [dispatch for dispatch in DISPATCHES if dispatch != "alltoall_capacity"]
)
@pytest.mark.parametrize("case", ["random", "balanced", "skewed", "crowded", "one group idle"])
def test_values_and_gradients_are_those_of_all_experts_on_all_tokens(dispatch, case):
    x, weight, weights, dy = drawn()
    expert = jnp.asarray(choices(case))
    right, _ = reference(x, expert, weight, weights, dy)
    ours, dropped = on_mesh(dispatch, x, expert, weight, weights, dy)
    assert float(dropped) == 0.0
    for i, (a, b) in enumerate(zip(ours, right, strict=True)):
        scale = max(np.abs(b).max(), 1.0)
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 5e-6 * scale, i


def test_a_buffer_of_fixed_capacity_drops_the_last_rows_and_reports_the_share():
    x, weight, weights, dy = drawn()
    expert = choices("crowded")
    (y, *_), dropped = on_mesh("alltoall_capacity", x, expert, weight, weights, dy)
    # Each group of 4 devices sends 32 rows to one device that takes 8: those of the first sender.
    assert float(dropped) == 0.75
    right, _ = reference(x, jnp.asarray(expert), weight, weights, dy)
    kept = np.arange(N) % 16 < 4
    np.testing.assert_allclose(np.asarray(y)[kept], np.asarray(right[0])[kept], atol=2e-5)
    assert not np.asarray(y)[~kept].any()


def test_a_buffer_is_never_larger_than_all_there_is():
    assert buffer_rows(64, 4, 2.0) == 128
    assert buffer_rows(64, 4, 100.0) == 256
    assert buffer_rows(10, 4, 0.3) == 8
