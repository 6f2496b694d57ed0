"""Hopper's attention kernels, interpreted, are attention with its scores whole; they fit a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_code import assert_code_fits, dump_code

from k2jax.ops.attention import blockwise_attention, hopper
from k2jax.planner import targets
from k2jax.planner.compiler import GPU_OPTIONS, devices_of
from k2jax.runtime import versions

LENGTH, QUERY, VALUE, SCALE = 150, 128, 64, 0.3  # two held blocks, the second mostly padding
NO_VIEWS = jax.__version_info__ < (0, 12)


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((1, 1, *s)) / 3, jnp.bfloat16) for s in shapes]


def whole(q, k, v, segment):
    """The mixture; largest logits and logs of sums."""
    q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
    logit = jnp.einsum("bhtc,bhsc->bhts", q, k) * SCALE
    seen = jnp.tril(segment[:, :, None] == segment[:, None])
    logit = jnp.where(seen[:, None], logit, -jnp.inf)
    y = jnp.einsum("bhts,bhsv->bhtv", jax.nn.softmax(logit), v)
    return y, (logit.max(axis=-1), jax.nn.logsumexp(logit, axis=-1))


@pytest.mark.skipif(NO_VIEWS, reason="this interpreter knows no transposed views")
def test_values_logits_and_gradients_are_those_of_whole_scores(capfd):
    q, k, v, dy = drawn((LENGTH, QUERY), (LENGTH, QUERY), (LENGTH, VALUE), (LENGTH, VALUE))
    segment = jnp.asarray(np.searchsorted([40, 137], np.arange(LENGTH), side="right")[None] + 1)
    segment = segment.astype(jnp.int32)
    interpret = versions.mosaic_gpu_interpreter(detect_races=True)
    y, top, logsum = hopper.forward(q, k, v, segment, scale=SCALE, interpret=interpret)
    saved = q, k, v, segment, y, logsum
    grads = hopper.backward(saved, dy, scale=SCALE, interpret=interpret)
    assert "RACE" not in capfd.readouterr().out
    right, back, rows = jax.vjp(lambda *args: whole(*args, segment), q, k, v, has_aux=True)
    pairs = zip(
        (y, top, logsum, *grads), (right, *rows, *back(dy.astype(jnp.float32))), strict=True
    )
    for i, (ours, expected) in enumerate(pairs):
        assert ours.shape == expected.shape
        error = np.abs(np.asarray(ours, np.float32) - np.asarray(expected, np.float32)).max()
        assert error <= 2**-7 * np.abs(expected.astype(jnp.float32)).max(), i


def test_only_hopper_gets_the_kernels_and_only_for_16_bits_and_widths_that_fit():
    def is_supported(gpu, query=192, value=128, dtype="bfloat16"):
        arrays = (jax.ShapeDtypeStruct((1, 64, 4_096, n), dtype) for n in (query, value))
        with versions.abstract_gpu(gpu):
            return hopper.is_supported(*arrays)

    assert is_supported("NVIDIA H100 80GB HBM3") and is_supported("NVIDIA H200", 128, 64)
    assert not is_supported("NVIDIA B200") and not is_supported("NVIDIA A100-SXM4-80GB")
    assert not is_supported("NVIDIA H200", dtype="float32")
    assert not is_supported("NVIDIA H200", 96) and not is_supported("NVIDIA H200", 256)
    assert not is_supported("NVIDIA H200", 192, 192)


@pytest.mark.compiles
def test_compiled_kernels_fit_hoppers_shared_memory_and_spill_no_register(tmp_path, monkeypatch):
    pytest.importorskip("jax_plugins.xla_cuda13")
    dump_code(monkeypatch, tmp_path)
    device = jax.sharding.SingleDeviceSharding(devices_of(targets.parse("h100:1x1"))[0])

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def step(q, k, v, segment, dy):
        def mix(q, k, v):
            return blockwise_attention(q, k, v, segment, 0.1)

        y, back, top = jax.vjp(mix, q, k, v, has_aux=True)
        return y, top, *back(dy)

    queries, values = array(1, 64, 4_096, 192), array(1, 64, 4_096, 128)
    args = queries, queries, values, array(1, 4_096, dtype="int32"), values
    with versions.abstract_gpu("NVIDIA H100"):
        lowered = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(GPU_OPTIONS)
    assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') == 3
    assert_code_fits(tmp_path, kernels=3)
