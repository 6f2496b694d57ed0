"""Formulas of inference against the arrays of the program, and against real compilers."""

import math

import pytest

from k2jax import configs, sharding
from k2jax.config import MeshConfig
from k2jax.params.arrays import abstract
from k2jax.params.kimi import declare_kimi
from k2jax.planner import targets, traffic
from k2jax.planner.compile_call import compile_call
from k2jax.planner.decoding import Call, decode, prompt_call

K2 = configs.load("kimi_k2").model
H200 = Call(K2, MeshConfig(expert=32), targets.parse("h200:4x8"), 256, 1, 8192)
V5P = Call(K2, MeshConfig(expert=32, model=4), targets.parse("v5p:4x4x8"), 256, 1, 8192)
COMPILERS = {"h200:4x8": "jax_plugins.xla_cuda13", "v5p:4x4x8": "libtpu"}


@pytest.mark.parametrize("form", ["plain", "fp8", "int4"])
def test_weights_are_the_bytes_of_the_arrays(form):
    import jax

    mesh = sharding.make_mesh(MeshConfig(expert=4, model=2))
    specs = declare_kimi(K2)
    with jax.set_mesh(sharding.inference_mesh(mesh, specs)):
        arrays = jax.tree.leaves(abstract(specs, "bfloat16", weights=form))
        held = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)
    call = Call(K2, MeshConfig(expert=4, model=2), H200.target, 8, 1, 64, form)
    assert decode(call).memory["weights"] == held


def test_a_resident_expert_is_read_once_however_many_rows_chose_it():
    few, many = (
        decode(Call(K2, H200.mesh, H200.target, 32 * rows, 1, 64)).memory_traffic
        for rows in (8, 800)
    )
    assert many < 1.1 * few + 1e9  # logits and rows of many tokens


@pytest.mark.parametrize("call", [H200, V5P], ids=["h200", "v5p"])
def test_a_step_of_k2_needs_less_than_a_third_of_a_gigabyte_of_network(call):
    assert traffic.total(decode(call).wire) < 0.3e9


@pytest.mark.compiles
@pytest.mark.parametrize("call", [H200, V5P], ids=["h200", "v5p"])
def test_the_compiled_step_sends_what_the_formula_says_and_no_weight(call):
    pytest.importorskip(COMPILERS[call.target.name])
    planned, found = decode(call), compile_call(call)
    assert traffic.total(found.account.wire) == pytest.approx(traffic.total(planned.wire), rel=0.1)
    assert found.memory["peak"] == pytest.approx(planned.peak, rel=0.1)
    smallest = 2 * K2.embed * (K2.kv_rank + K2.rope)  # of a device's matrices, in bfloat16
    assert found.account.largest < smallest


@pytest.mark.compiles
def test_a_compiled_chunk_of_prompts_sends_what_the_formula_says():
    pytest.importorskip(COMPILERS["h200:4x8"])
    call = prompt_call(H200, 16_384)
    planned, found = decode(call), compile_call(call)
    assert traffic.total(found.account.wire) == pytest.approx(traffic.total(planned.wire), rel=0.1)
    assert found.memory["peak"] == pytest.approx(planned.peak, rel=0.1)
