"""Kernels, by the real compilers of accelerators that this machine lacks, at the sizes of K2."""

import jax
import jax.numpy as jnp
import pytest

from k2jax.ops.attention import blockwise_attention
from k2jax.ops.moe import grouped_matmul
from k2jax.planner import targets
from k2jax.planner.compiler import GPU_OPTIONS, devices_of
from k2jax.planner.hlo import account
from k2jax.runtime.versions import abstract_gpu

ROWS, EXPERTS, EMBED, HIDDEN = 65_536, 12, 7_168, 2_048
GPUS = ("h100:1x1", "h200:1x1", "b200:1x1")
KERNELS = {"b200:1x1": "__gpu$xla.gpu.triton"}  # where Mosaic compiles none
TPUS = ("v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def forward_and_backward(x, w, size, dy):
    y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, size), x, w)
    return y, *back(dy)


def compile_for(target, step, args):
    """By the compiler of a target such as "h100:1x1"."""
    if target not in GPUS:
        return jax.jit(step).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    with abstract_gpu(f"NVIDIA {target[:4].upper()}"):
        lowered = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.compile(GPU_OPTIONS)


@pytest.mark.compiles
@pytest.mark.parametrize("target", [*GPUS, *TPUS])
def test_grouped_products_compile_and_no_row_meets_every_expert(target):
    pytest.importorskip("jax_plugins.xla_cuda13" if target in GPUS else "libtpu")
    device = jax.sharding.SingleDeviceSharding(devices_of(targets.parse(target))[0])

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=device)

    size = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32, sharding=device)
    args = (array(ROWS, EMBED), array(EXPERTS, EMBED, HIDDEN), size, array(ROWS, HIDDEN))
    compiled = compile_for(target, forward_and_backward, args)
    # The matrices, transposed: compilers of TPUs copy them, the newer ones not into an output's
    # memory. Masked copies of the rows, one an expert, would take 11 GB.
    matrices = 2 * EXPERTS * EMBED * HIDDEN
    assert compiled.memory_analysis().temp_size_in_bytes < matrices + 1e8
    assert account(compiled.as_text()).flops == 3 * 2 * ROWS * EMBED * HIDDEN


@pytest.mark.compiles
@pytest.mark.parametrize("target", [*GPUS, *TPUS])
def test_attention_compiles_and_no_head_has_its_scores_whole(target):
    pytest.importorskip("jax_plugins.xla_cuda13" if target in GPUS else "libtpu")
    device = jax.sharding.SingleDeviceSharding(devices_of(targets.parse(target))[0])

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def step(q, k, v, segment, dy):
        def mix(q, k, v):
            return blockwise_attention(q, k, v, segment, 0.1)

        y, back, top = jax.vjp(mix, q, k, v, has_aux=True)
        return y, top, *back(dy)

    queries, values = array(1, 64, 4096, 192), array(1, 64, 4096, 128)
    args = (queries, queries, values, array(1, 4096, dtype="int32"), values)
    compiled = compile_for(target, step, args)
    mosaic = "tpu_custom_call" if target in TPUS else "mosaic_gpu_v2"
    kernel = KERNELS.get(target, f'custom_call_target="{mosaic}"')
    assert compiled.as_text().count(kernel) == 3
    # What each query's row needs, 1 MB of float32 a number; whole scores would take 2 GB.
    assert compiled.memory_analysis().temp_size_in_bytes < 4e6
    # Seven products of three kernels, and two that the gradients make again; half is masked.
    pairs, (qk, value) = 64 * 4096**2 / 2, (192, 128)
    assert account(compiled.as_text()).flops == 2 * pairs * (5 * qk + 4 * value)
