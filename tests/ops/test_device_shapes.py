"""GPU kernels at what one device has of K2, Moonlight and DeepSeek-V3 on the recommended meshes.

Widths and lengths are those of the runs. Smaller is what repeats without meeting: the rows of a
batch, heads, and experts. The kernels are interpreted; what their tiles take of a
GPU is computed here, and compared with the compiler where it is installed.
"""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax import configs
from k2jax.ops.attention import blockwise_attention
from k2jax.ops.attention import gpu as attention
from k2jax.ops.lowbit import Fp8, Int4, decode
from k2jax.ops.moe import grouped_gpu, grouped_matmul, low_bit_gpu
from k2jax.ops.mosaic import SWITCH
from k2jax.planner import targets
from k2jax.planner.compiler import GPU_OPTIONS, devices_of
from k2jax.planner.search import search
from k2jax.runtime.versions import abstract_gpu, fast_compile_flags

RUNS = {
    "kimi_k2": ("h100:128x8", "h200:32x8", "b200:16x8"),
    "moonlight_16b_a3b": ("h100:8x8", "h200:4x8"),
    "deepseek_v3": ("h100:128x8", "h200:32x8"),
}
# Bytes of shared memory that a kernel may ask for: 227 KiB on Hopper and Blackwell, 163 on A100
# [CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"].
HOPPER, AMPERE = 227 << 10, 163 << 10
SCRATCH = 1 << 10  # of reductions over a block's rows, which the compiler adds
ITEM = 2  # bytes of bfloat16


@dataclasses.dataclass(frozen=True)
class Share:
    """What a device has of a layer: its experts and their widths, its heads and their widths."""

    experts: int
    embed: int
    hidden: int
    heads: int
    length: int
    query: int
    value: int


def share_of(name: str, target: str) -> Share:
    run = configs.load(name)
    rows = targets.parse(target).devices  # one a device, as in the tables of docs/scaling.md
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, rows=rows))
    model, sizes = run.model, search(run, targets.parse(target), {}, False).best.mesh.sizes
    return Share(
        model.experts // sizes["expert"],
        model.embed,
        model.expert_ffw // sizes["model"],
        model.heads // (sizes["model"] * sizes["context"]),
        run.data.context,
        model.nope + model.rope,
        model.value,
    )


@functools.cache
def shares() -> list[Share]:
    """Of all runs, each once."""
    pairs = ((name, target) for name, places in RUNS.items() for target in places)
    return list(dict.fromkeys(share_of(*pair) for pair in pairs))


# Shared memory: operands of tensor cores, one copy for each stage under way, and what is held.


def attention_bytes(query: int, value: int) -> dict[str, int]:
    """Of the three kernels; of the side that is met there is a copy for each stage."""
    forward, dq, dkv = attention.FORWARD, attention.QUERY_GRADIENT, attention.KEY_GRADIENT
    both = query + value
    return {
        "_attention": ITEM * (forward.queries * query + forward.stages * forward.keys * both),
        "_attention_dq": ITEM * (dq.queries * both + dq.stages * dq.keys * both),
        "_attention_dkv": ITEM * (dkv.keys * both + dkv.stages * dkv.queries * both),
    }


def grouped_bytes(width: int, wide: int) -> dict[str, int]:
    """Of the product and of the sum: a piece of each operand, for each stage."""
    stages, depth = grouped_gpu.PARAMS["num_stages"], grouped_gpu.DEPTH // ITEM
    columns = grouped_gpu._divisor(wide, grouped_gpu.COLUMNS)
    down = grouped_gpu._divisor(width, grouped_gpu.ROWS)
    depth_of_product = grouped_gpu._divisor(width, depth)
    return {
        "_tile": stages * ITEM * depth_of_product * (grouped_gpu.ROWS + columns),
        "_sum": stages * ITEM * depth * (down + columns),
    }


def products(share: Share) -> set[tuple[int, int]]:
    """Widths of the experts' products, forward and backward."""
    pairs = (share.embed, 2 * share.hidden), (share.hidden, share.embed)
    return {*pairs, *((wide, width) for width, wide in pairs)}


@pytest.mark.slow
def test_tiles_fit_the_shared_memory_of_every_gpu_that_gets_the_kernels():
    for share in shares():
        for name, size in attention_bytes(share.query, share.value).items():
            assert size + SCRATCH <= HOPPER, (name, share)
        for widths in products(share):
            for name, size in grouped_bytes(*widths).items():
                assert size + SCRATCH <= AMPERE, (name, widths)


def test_the_largest_tiles_fit_too():
    largest = attention_bytes(attention.MAX_WIDTH, attention.MAX_WIDTHS - attention.MAX_WIDTH)
    assert max(largest.values()) + SCRATCH <= HOPPER
    assert max(grouped_bytes(1 << 20, 1 << 20).values()) + SCRATCH <= AMPERE


def compiled_bytes(step, args, folder: Path) -> dict[str, int]:
    """What the compiler asks for, by kernel."""
    with abstract_gpu("NVIDIA H100"):
        lowered = jax.jit(step).trace(*args).lower(lowering_platforms=("cuda",))
    lowered.compile(GPU_OPTIONS | {"xla_dump_to": str(folder)})
    (file,) = folder.glob("*.thunk_sequence.txt")
    lines = re.findall(r"\] (_\w+?)(?:__\d+)? grid.* shared_memory: (\d+)", file.read_text())
    return {name: int(size) for name, size in lines}


@pytest.mark.compiles
def test_the_compiler_takes_as_much_shared_memory_as_is_computed(tmp_path, monkeypatch):
    pytest.importorskip("jax_plugins.xla_cuda13")
    monkeypatch.setenv(SWITCH, "0")  # Hopper's own are read from what Mosaic compiled
    device = jax.sharding.SingleDeviceSharding(devices_of(targets.parse("h100:1x1"))[0])

    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def attend(q, k, v, segment, dy):
        def mix(q, k, v):
            return blockwise_attention(q, k, v, segment, 0.1)

        y, back, top = jax.vjp(mix, q, k, v, has_aux=True)
        return y, top, *back(dy)

    def multiply(x, w, size, dy):
        y, back = jax.vjp(lambda x, w: grouped_matmul(x, w, size), x, w)
        return y, *back(dy)

    share, rows = share_of("kimi_k2", "h200:32x8"), 4_096
    queries = array(1, share.heads, share.length, share.query)
    values = array(1, share.heads, share.length, share.value)
    segment = array(1, share.length, dtype="int32")
    args = (queries, queries, values, segment, values)
    right = attention_bytes(share.query, share.value)
    ours = compiled_bytes(attend, args, tmp_path / "attention")
    assert ours.keys() == right.keys()
    for name, size in right.items():
        assert size <= ours[name] <= size + SCRATCH
    for width, wide in ((share.embed, 2 * share.hidden), (share.hidden, share.embed)):
        size = array(share.experts, dtype="int32")
        args = (array(rows, width), array(share.experts, width, wide), size, array(rows, wide))
        ours = compiled_bytes(multiply, args, tmp_path / f"grouped{width}")
        assert ours == grouped_bytes(width, wide)


# The kernels, interpreted.

# Few but long loops: unlike other tests' programs they are worth compiling well.
WELL: dict[str, int | bool] = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
if "xla_cpu_use_fusion_emitters" in fast_compile_flags():
    WELL["xla_cpu_use_fusion_emitters"] = True


def interpret(kernel, *args, **settings):
    kernel = functools.partial(kernel, interpret=True, **settings)
    return jax.jit(kernel).lower(*args).compile(WELL)(*args)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_close(ours, right, what=""):
    """Within two roundings to bfloat16 of the largest value."""
    ours, right = np.asarray(ours, np.float32), np.asarray(right, np.float32)
    assert ours.shape == right.shape
    assert np.abs(ours - right).max() <= 2**-7 * np.abs(right).max(), what


@pytest.mark.slow
def test_attention_of_a_device_is_attention_with_its_scores_whole():
    heads = 1  # of a device's, which are programs of their own
    for length, query, value in {(s.length, s.query, s.value) for s in shares()}:
        q, k = (drawn(1, heads, length, query, seed=n) for n in range(2))
        v, dy = (drawn(1, heads, length, value, seed=n) for n in range(2, 4))
        q, k, v, dy = (jnp.asarray(a, jnp.bfloat16) for a in (q, k, v, dy))
        segment = np.ones((1, length), np.int32)
        segment[0, length // 3 :] = 2
        segment[0, -100:] = 0
        scale = query**-0.5

        def whole(q, k, v, segment=segment, scale=scale):
            q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
            logit = jnp.einsum("bhtc,bhsc->bhts", q, k) * scale
            seen = segment[:, :, None] == segment[:, None]
            logit = jnp.where(jnp.tril(seen)[:, None], logit, -jnp.inf)
            y = jnp.einsum("bhts,bhsv->bhtv", jax.nn.softmax(logit), v)
            return y, (logit.max(axis=-1), jax.nn.logsumexp(logit, axis=-1))

        def reference(q, k, v, dy):
            y, back, rows = jax.vjp(whole, q, k, v, has_aux=True)
            return [y, *rows, *back(dy.astype(jnp.float32))]

        def kernels(q, k, v, dy, segment=segment, scale=scale):
            args = q, k, v, jnp.asarray(segment)
            forward, *back = (
                sizes._replace(interpret=True)
                for sizes in (attention.FORWARD, attention.QUERY_GRADIENT, attention.KEY_GRADIENT)
            )
            y, top, logsum = attention.forward(*args, scale=scale, sizes=forward)
            grads = attention.backward((*args, y, logsum), dy, scale=scale, sizes=tuple(back))
            return [y, top, logsum, *grads]

        pairs = zip(jax.jit(kernels)(q, k, v, dy), jax.jit(reference)(q, k, v, dy), strict=True)
        for number, (ours, right) in enumerate(pairs):
            assert_close(ours, right, number)


ROWS = 160  # of all experts, where a run has thousands for each


def sizes_of(experts: int) -> np.ndarray:
    """Rows of each expert: one has many, one none, some rows belong to nobody."""
    share = np.random.default_rng(experts).dirichlet(np.full(experts, 0.5))
    size_E = np.floor(share * (ROWS - 20)).astype(np.int32)
    size_E[size_E.argmin()] = 0
    return size_E


def matrices(experts: int, width: int, wide: int) -> jax.Array:
    """Unlike ones, quickly: the rows of one, turned by the expert's number."""
    one = jnp.asarray(drawn(width, wide), jnp.bfloat16)
    return jnp.stack([jnp.roll(one, 7 * n, axis=0) for n in range(experts)])


def by_group(size_E):
    ends = np.cumsum(size_E)
    return [slice(end - size, end) for end, size in zip(ends, size_E, strict=True)]


@pytest.mark.slow
def test_products_of_a_devices_experts_are_those_of_each_group():
    # At most three experts: a tile is of one, and no other is read for it.
    cases = {(min(s.experts, 3), *widths) for s in shares() for widths in products(s)}
    for experts, width, wide in sorted(cases):
        size_E, w = sizes_of(experts), matrices(experts, width, wide)
        x, dy = (jnp.asarray(drawn(ROWS, n, seed=n), jnp.bfloat16) for n in (width, wide))
        size = jnp.asarray(size_E)
        y = interpret(grouped_gpu.grouped_matmul, x, w, size)
        dx = interpret(grouped_gpu.grouped_matmul, dy, w, size, transposed=True)
        right_y, right_dx = np.zeros((ROWS, wide)), np.zeros((ROWS, width))
        for n, rows in enumerate(by_group(size_E)):
            matrix = np.asarray(w[n], np.float32)
            right_y[rows] = np.asarray(x[rows], np.float32) @ matrix
            right_dx[rows] = np.asarray(dy[rows], np.float32) @ matrix.T
        assert_close(y, right_y, (experts, width, wide))
        assert_close(dx, right_dx, (experts, width, wide))


@pytest.mark.slow
def test_gradients_of_experts_matrices_are_sums_over_each_groups_rows():
    # Two experts: each program sums for one, and the interpreter copies the result for each.
    cases = {(s.embed, 2 * s.hidden) for s in shares()} | {(s.hidden, s.embed) for s in shares()}
    for width, wide in sorted(cases):
        size_E = np.asarray([100, 50], np.int32)
        x, dy = (jnp.asarray(drawn(ROWS, n, seed=n), jnp.bfloat16) for n in (width, wide))
        dw = interpret(grouped_gpu.grouped_outer, x, dy, jnp.asarray(size_E))
        for n, rows in enumerate(by_group(size_E)):
            right = np.asarray(x[rows], np.float32).T @ np.asarray(dy[rows], np.float32)
            assert_close(dw[n], right, (width, wide, n))


def low_bit(form: str, experts: int, width: int, wide: int):
    """Codes of any value, and scales that differ, as published files have them."""
    rng = np.random.default_rng(width)
    if form == "int4":
        word = rng.integers(-(2**31), 2**31 - 1, (experts, width // 8, wide), np.int32)
        scale = rng.uniform(0.01, 0.02, (experts, width // 32, wide))
        return Int4(jnp.asarray(word), jnp.asarray(scale, jnp.bfloat16))
    code = jnp.asarray(rng.standard_normal((experts, width, wide), np.float32), jnp.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (experts, width // 128, wide // 128)).astype(np.float32)
    return Fp8(code, jnp.asarray(scale))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "int4"])
@pytest.mark.parametrize(
    ("experts", "width", "wide"), [(4, 7_168, 2_048), (4, 2_048, 7_168), (4, 7_168, 1_024)]
)
def test_products_with_low_bit_experts_are_those_of_decoded_ones(form, experts, width, wide):
    w, size_E = low_bit(form, experts, width, wide), np.asarray([40, 0, 3, 70], np.int32)
    x = jnp.asarray(drawn(120, width), jnp.bfloat16)
    corner, first = jnp.zeros(2, jnp.int32), jnp.int32(0)
    y = interpret(low_bit_gpu.grouped_matmul, x, w, first, jnp.asarray(size_E), corner)
    for n, rows in enumerate(by_group(size_E)):
        if size_E[n]:
            one = jax.tree.map(lambda a, n=n: a[n], w)
            matrix = np.asarray(decode(one).astype(jnp.bfloat16), np.float32)
            assert_close(y[rows], np.asarray(x[rows], np.float32) @ matrix, n)
