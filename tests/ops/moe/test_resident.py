"""Experts that stay in the stack of all layers give what they give alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.ops.moe import grouped_gpu, resident

pytestmark = pytest.mark.device

LAYERS, EXPERTS, EMBED, FFW = 3, 4, 32, 16
SIZES = {"even": [5, 5, 5, 5], "one has all": [0, 20, 0, 0], "some have none": [11, 0, 0, 6]}


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("run", [resident._run_blocks, resident._run_groups])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_go_through_their_expert_of_the_layer(run, sizes):
    x_MD, weight_M1 = drawn(20, EMBED), drawn(20, 1)
    stacks = (
        drawn(LAYERS, EXPERTS, EMBED, FFW),
        drawn(LAYERS, EXPERTS, EMBED, FFW) + 1,
        drawn(LAYERS, EXPERTS, FFW, EMBED),
    )
    ours = run(x_MD, weight_M1, stacks, jnp.int32(1), jnp.asarray(sizes, jnp.int32))
    first = 0
    for expert, size in enumerate(sizes):
        rows = slice(first, first + size)
        gate_DF, up_DF, down_FD = (w[1, expert] for w in stacks)
        theirs = (jax.nn.silu(x_MD[rows] @ gate_DF) * (x_MD[rows] @ up_DF)) @ down_FD
        np.testing.assert_allclose(ours[rows], theirs * weight_M1[rows], atol=1e-4, rtol=1e-5)
        first += size


def test_the_kernel_of_gpus_finds_the_matrices_of_a_later_layer():
    x_MK, w_XKN = drawn(20, 64), drawn(LAYERS * EXPERTS, 64, 32)
    size_E = jnp.asarray(SIZES["some have none"], jnp.int32)
    ours, alone = (
        grouped_gpu.grouped_matmul(x_MK, w_XKN[part], size_E, first=first, rows=8, interpret=True)
        for part, first in ((slice(None), 2 * EXPERTS), (slice(2 * EXPERTS, None), 0))
    )
    np.testing.assert_array_equal(ours, alone)
    assert np.abs(ours[:17]).min() > 0 and not np.any(ours[17:])
