"""One test for every way to run the chosen experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.ops.moe import expert_mlp, experts, fuse_gate_up, permute, reference_expert_mlp

pytestmark = pytest.mark.device

N, D, F, E, K = 41, 6, 5, 7, 3


def sorted_first(run):
    def mlp(x, expert, weight, weights):
        order, place, size, weight = permute.sort_by_expert(expert, weight, weights[0].shape[0])
        return run(x, order, place, size, weight, weights)

    return mlp


MLPS = {
    "blocks": sorted_first(experts.expert_mlp_by_blocks),
    "groups": sorted_first(experts.expert_mlp_by_groups),
    "reference": reference_expert_mlp,
    "chosen": expert_mlp,
}


def choices(case):
    """Experts of each token; outside of 0..E-1 are another device's."""
    rng = np.random.default_rng(3)

    def pick(pool):
        return np.stack([rng.permutation(pool)[:K] for _ in range(N)])

    return {
        "random": pick(E),
        "empty": pick([0, 2, 5, 6]),  # nobody chose 1, 3, 4
        "crowded": np.tile([4, 0, 2], (N, 1)),
        "elsewhere": pick(3 * E) - E,
        "none": pick([-3, -1, E, E + 4]),
    }[case].astype(np.int32)


def drawn(dtype):
    rng = np.random.default_rng(1)

    def cast(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    weight = jnp.asarray(rng.random((N, K)), "float32")
    return cast(N, D), weight, (cast(E, D, F), cast(E, D, F), cast(E, F, D)), cast(N, D)


@functools.cache
def compiled(name):
    @jax.jit
    def both(x, expert, weight, weights, dy):
        def f(x, weight, w):
            return MLPS[name](x, expert, weight, fuse_gate_up(*w))

        y, back = jax.vjp(f, x, weight, weights)
        dx, dweight, dweights = back(dy)
        return [y, dx, dweight, *dweights]

    return both


def expected(x, expert, weight, weights, dy):
    """Values and gradients, a token and a choice at a time, in float64."""
    x, weight, dy = (np.asarray(a, np.float64) for a in (x, weight, dy))
    gate, up, down = (np.asarray(a, np.float64) for a in weights)
    y, dx, dweight = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weight)
    dgate, dup, ddown = (np.zeros_like(w) for w in (gate, up, down))
    for n, k in np.ndindex(expert.shape):
        e = expert[n, k]
        if not 0 <= e < E:
            continue
        g, u = x[n] @ gate[e], x[n] @ up[e]
        slope = 1 / (1 + np.exp(-g))
        h = g * slope * u
        y[n] += weight[n, k] * (h @ down[e])
        dweight[n, k] = dy[n] @ (h @ down[e])
        dh = weight[n, k] * (down[e] @ dy[n])
        dg, du = dh * u * slope * (1 + g * (1 - slope)), dh * g * slope
        ddown[e] += weight[n, k] * np.outer(h, dy[n])
        dgate[e] += np.outer(x[n], dg)
        dup[e] += np.outer(x[n], du)
        dx[n] += gate[e] @ dg + up[e] @ du
    return [y, dx, dweight, dgate, dup, ddown]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("case", ["random", "empty", "crowded", "elsewhere", "none"])
def test_values_and_gradients_are_those_of_a_loop_over_choices(name, case, dtype):
    x, weight, weights, dy = drawn(dtype)
    expert = choices(case)
    results = compiled(name)(x, jnp.asarray(expert), weight, weights, dy)
    right = expected(x, expert, weight, weights, dy)
    # bfloat16 rounds (2^-9) at each of the chain's four products, and sums of many of them.
    tolerance = 5e-6 if dtype == "float32" else 3e-2
    for i, (a, b) in enumerate(zip(results, right, strict=True)):
        scale = max(np.abs(b).max(), 1.0)
        assert np.abs(np.asarray(a, np.float64) - b).max() <= tolerance * scale, i
