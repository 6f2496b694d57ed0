"""Loops are counted in full: a scanned model against its unrolled twin and against formulas."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from k2jax.ops.attention import gpu
from k2jax.ops.moe import grouped_gpu
from k2jax.planner import hlo
from k2jax.planner.hlo import account

LAYERS, ROWS, WIDTH, HIDDEN = 5, 16, 32, 64
SHAPE = (1, 2, 2, 1, 2)  # replica, data, expert, context, model
AXES = ("replica", "data", "expert", "context", "model")


@functools.cache
def compiled(scanned):
    mesh = jax.make_mesh(SHAPE, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 5)
    batch = P(("data", "expert"), None)

    def layer(x, weights):
        up, down = (jax.reshard(w, P(None, "model")) for w in weights[:1]), weights[1]
        (up,) = up
        hidden = jnp.einsum("bd,df->bf", x, up, out_sharding=P(("data", "expert"), "model"))
        return jnp.einsum("bf,fd->bd", jnp.tanh(hidden), down, out_sharding=batch), None

    def forward(x, up, down):
        if scanned:
            return jax.lax.scan(layer, x, (up, down))[0]
        for i in range(LAYERS):
            x, _ = layer(x, (up[i], down[i]))
        return x

    def array(shape, *spec):
        return jax.ShapeDtypeStruct(shape, "float32", sharding=jax.NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        return (
            jax.jit(forward)
            .lower(
                array((ROWS, WIDTH), ("data", "expert"), None),
                array((LAYERS, WIDTH, HIDDEN), None, "data", "model"),
                array((LAYERS, HIDDEN, WIDTH), None, "model", None),
            )
            .compile()
            .as_text()
        )


@pytest.mark.parametrize("scanned", [True, False])
def test_a_model_counts_what_the_formula_says(scanned):
    found = account(compiled(scanned), SHAPE)
    assert found.flops == LAYERS * 2 * 2 * ROWS * WIDTH * HIDDEN / 8
    gathered = WIDTH * HIDDEN / 2 * 4
    assert found.wire["all-gather"]["data"] == LAYERS * gathered / 2
    summed = ROWS / 4 * WIDTH * 4
    assert found.wire["all-reduce"]["model"] == LAYERS * 2 * summed / 2
    assert found.open_loops == 0


def program(line, shapes=""):
    return f"ENTRY %main (p: f32[1]) -> f32[1] {{\n{shapes}\n  {line}\n}}\n"


def test_groups_written_as_ranges_name_their_axes():
    line = (
        "%g = bf16[8,4]{1,0} all-gather(%p), channel_id=1,"
        " replica_groups=[4,2]<=[2,2,2]T(1,2,0), dimensions={0}"
    )
    found = account(program(line, "  %p = bf16[4,4]{1,0} parameter(0)"), SHAPE)
    assert found.wire == {"all-gather": {"data": 32.0}}


@pytest.mark.parametrize(
    ("groups", "axes", "ways"),
    [
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", "data+context", 4),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", "expert+context", 4),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", "data", 2),
    ],
)
def test_groups_written_as_a_mesh_name_their_axes(groups, axes, ways):
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
        f"  %r = f32[8]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add\n}}\n"
    )
    assert account(text, (1, 2, 2, 2, 1)).wire == {"all-reduce": {axes: 64 * (ways - 1) / ways}}


@pytest.mark.parametrize(
    "call",
    [
        "bf16[8,8]{1,0} ragged-all-to-all",
        "((bf16[4,8]{1,0}, bf16[8,8]{1,0}), bf16[8,8]{1,0}) ragged-all-to-all-start",
    ],
)
@pytest.mark.parametrize(("sent", "into"), [("4,8", "8,8"), ("8,8", "4,8")])
def test_a_ragged_exchange_counts_its_balanced_payload(call, sent, into):
    text = (
        f"ENTRY %main (p: bf16[{sent}]) -> bf16[{into}] {{\n"
        f"  %p = bf16[{sent}]{{1,0}} parameter(0)\n  %o = bf16[{into}]{{1,0}} parameter(1)\n"
        f"  %r = {call}(%p, %o, %a, %b, %c, /*index=5*/%d),"
        " replica_groups={{0,1},{2,3}}\n}\n"
    )
    assert account(text, (1, 2, 2, 1, 1)).wire == {"ragged-all-to-all": {"expert": 64 / 2}}


def test_a_fused_reduce_scatter_of_a_tpu_is_no_all_reduce():
    text = (
        "%all-reduce-scatter.1 (p: bf16[8]) -> bf16[4] {\n"
        "  %p = bf16[8]{0} parameter(0)\n"
        "  %r = bf16[8]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add\n}\n"
        "ENTRY %main (q: bf16[8]) -> bf16[4] {\n"
        "  %q = bf16[8]{0:T(256)(2,1)S(1)} parameter(0)\n"
        "  ROOT %f = bf16[4]{0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1\n}\n"
    )
    assert account(text, SHAPE).wire == {"reduce-scatter": {"model": 8.0}}


def test_a_batched_product_written_as_a_convolution_counts_its_taps():
    shapes = "  %a = bf16[4,16,8]{2,1,0} parameter(0)\n  %b = bf16[4,8,32]{2,1,0} parameter(1)"
    line = (
        "%c = bf16[4,16,32]{2,1,0} convolution(%a, %b),"
        " window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf"
    )
    assert account(program(line, shapes)).flops == 2 * 4 * 16 * 8 * 32


def test_loops_without_a_count_and_silent_kernels_are_told():
    text = (
        "%body (p: f32[4]) -> f32[4] {\n"
        '  %k = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call"\n}\n'
        "%cond (p: f32[4]) -> pred[] {\n  %p = f32[4]{0} parameter(0)\n}\n"
        "ENTRY %main (q: f32[4]) -> f32[4] {\n  %q = f32[4]{0} parameter(0)\n"
        "  ROOT %w = f32[4]{0} while(%q), condition=%cond, body=%body\n}\n"
    )
    found = account(text)
    assert found.open_loops == 1
    assert found.kernels == {"tpu_custom_call": 1}


def test_a_kernel_that_tells_its_work_is_counted():
    line = (
        '%k = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config='
        '{"custom_call_config":{"body":"T0==","cost_estimate":{"flops":"640","transcendentals":"8"}}}'
    )
    found = account(program(line, "  %p = f32[4]{0} parameter(0)"))
    assert found.flops == 640 and not found.kernels


@pytest.mark.parametrize(
    ("kernel", "operands", "out", "flops"),
    [
        ("_tile", ["s32[9]"] * 3 + ["bf16[64,16]", "bf16[4,16,32]"], "bf16[64,32]", 64 * 16 * 32),
        ("_tile", ["s32[9]"] * 3 + ["bf16[64,16]", "bf16[4,32,16]"], "bf16[64,32]", 64 * 16 * 32),
        ("_sum", ["s32[4]"] * 2 + ["bf16[64,16]", "bf16[64,32]"], "bf16[4,16,32]", 64 * 16 * 32),
    ],
)
def test_grouped_products_on_gpus_are_counted_by_their_rows(kernel, operands, out, flops):
    names = [f"%a{i}" for i in range(len(operands))]
    lines = [f"  {a} = {s} parameter({a[2:]})" for a, s in zip(names, operands, strict=True)]
    call = (
        f"%k = {out}{{1,0}} custom-call({', '.join(names)}),"
        ' custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_z = 1 : i32,'
        f' ir = "ML\\EFR", name = "{kernel}", num_stages = 3 : i32, num_warps = 8 : i32}}'
    )
    shapes = "\n".join(lines)
    found = account(program(call, shapes))
    assert found.flops == 2 * flops and not found.kernels
    assert account(program(call.replace(kernel, "_other"), shapes)).kernels


def test_kernels_counted_by_name_are_those_of_the_ops():
    kernels = gpu._attention, gpu._attention_dq, gpu._attention_dkv
    assert set(hlo.ATTENTION) == {kernel.__name__ for kernel in kernels}
    assert set(hlo.GROUPED) == {grouped_gpu._tile.__name__, grouped_gpu._sum.__name__}


@pytest.mark.parametrize("start", ["call-start", "async-start", "call"])
def test_a_collective_that_another_core_carries_out_is_counted(start):
    text = (
        "%beside (q: f32[4]) -> f32[8] {\n  %q = f32[4]{0} parameter(0)\n"
        "  ROOT %g = f32[8]{0} all-gather(%q), replica_groups={{0,1},{2,3}}, dimensions={0}\n}\n\n"
        "ENTRY %main (p: f32[4]) -> f32[8] {\n  %p = f32[4]{0} parameter(0)\n"
        f"  %s = ((f32[4]{{0}}, token[]), f32[8]{{0}}) {start}(%p), to_apply=%beside\n}}\n"
    )
    assert account(text, (1, 2, 2, 1, 1)).wire == {"all-gather": {"expert": 32 / 2}}
