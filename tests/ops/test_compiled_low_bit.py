"""Products with K2's low-bit experts, by the real compilers: no stack is ever decoded whole."""

import jax
import jax.numpy as jnp
import pytest

from k2jax.ops.lowbit import Fp8, Int4
from k2jax.ops.moe.resident import resident_mlp
from k2jax.planner import targets
from k2jax.planner.compiler import GPU_OPTIONS, devices_of
from k2jax.runtime.versions import abstract_gpu

ROWS, LAYERS, EXPERTS, EMBED, HIDDEN = 1_024, 60, 12, 7_168, 2_048
GPUS, TPUS = ("h200:1x1", "b200:1x1"), ("v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@pytest.mark.compiles
@pytest.mark.parametrize("form", ["fp8", "int4"])
@pytest.mark.parametrize("target", [*GPUS, *TPUS])
def test_a_layer_of_experts_decodes_at_most_one_matrix_at_a_time(target, form):
    pytest.importorskip("jax_plugins.xla_cuda13" if target in GPUS else "libtpu")
    device = jax.sharding.SingleDeviceSharding(devices_of(targets.parse(target))[0])

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def stack(rows, columns):
        count = (LAYERS, EXPERTS)
        if form == "int4":
            word = array(*count, rows // 8, columns, dtype="int32")
            return Int4(word, array(*count, rows // 32, columns))
        scale = array(*count, rows // 128, columns // 128, dtype="float32")
        return Fp8(array(*count, rows, columns, dtype=jnp.float8_e4m3fn), scale)

    stacks = (stack(EMBED, HIDDEN), stack(EMBED, HIDDEN), stack(HIDDEN, EMBED))
    number, sizes = array(dtype="int32"), array(EXPERTS, dtype="int32")
    args = (array(ROWS, EMBED), array(ROWS, 1, dtype="float32"), stacks, number, sizes)
    if target in GPUS:
        with abstract_gpu(f"NVIDIA {target[:4].upper()}"):
            lowered = jax.jit(resident_mlp).trace(*args).lower(lowering_platforms=("cuda",))
        compiled = lowered.compile(GPU_OPTIONS)
        assert compiled.as_text().count("__gpu$xla.gpu.triton") == 3
    else:
        compiled = jax.jit(resident_mlp).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    # A float32 matrix, and rows of products; bfloat16 matrices of a layer would take 1.06 GB.
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * EMBED * HIDDEN + 6 * 2 * ROWS * EMBED
