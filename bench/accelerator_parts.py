"""The parts of `accelerator.py`; JAX is imported when one runs."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
TRITON = "k2jax, Triton"  # our kernels but for those that Mosaic compiles
SMALL_RUN = [
    *("--data.path=docs", "--data.rows=2", "--data.context=64", "--model.vocab=1024"),
    *("--model.moe_layers=1", "--model.experts=8", "--model.embed=64"),
]


@dataclasses.dataclass(frozen=True)
class Part:
    """Something to measure.

    Attributes:
        run: yields results, of whether sizes are small and the rate of the dense product.
        least_seconds: with fewer left it is not begun.
        most_seconds: it is ended after them.
    """

    run: Callable[[bool, float], Iterator[Line]]
    least_seconds: int
    most_seconds: int


def measure_seconds(run: Callable, *args: Any, repeats: int = 5) -> float:
    """Median time of a compiled function, which is run twice before."""
    import jax

    for _ in range(2):
        jax.block_until_ready(run(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(*args))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def rate(flops: float, seconds: float, dense: float) -> Line:
    """A rate, and its share of the dense product's."""
    line = {"ms": round(1e3 * seconds, 3), "flops_per_second": flops / seconds}
    return line | ({"share": round(flops / seconds / dense, 4)} if dense else {})


def draw(*shape: int, seed: int = 0, dtype: str = "bfloat16"):
    """Normal values, divided by the root of the rows they are multiplied along."""
    import jax

    return jax.random.normal(jax.random.key(seed), shape, dtype) / shape[-2] ** 0.5


def name_versions(small: bool, dense: float) -> Iterator[Line]:
    """What runs here."""
    import jax

    device = jax.devices()[0]
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax", "optax")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = (device.memory_stats() or {}).get("bytes_limit")
    yield {"python": sys.version.split()[0], "versions": found, "device": device.device_kind} | (
        {"platform": device.platform, "devices": jax.device_count(), "memory": memory}
    )


def check_kernels(small: bool, dense: float) -> Iterator[Line]:
    """Kernels against their references, as before training."""
    from k2jax.config import ConfigError
    from k2jax.configs import load
    from k2jax.model import Dispatch
    from k2jax.model.kernel_check import check_kernels as check

    for name in ("tiny",) if small else ("kimi_k2", "tiny"):
        try:
            check(Dispatch(), load(name).model, 4_096)
            yield {"config": name, "right": True}
        except ConfigError as error:
            yield {"config": name, "right": False, "why": str(error)}


def multiply_dense(small: bool, dense: float) -> Iterator[Line]:
    """The rate that others are a share of."""
    import jax

    for size in (256,) if small else (4_096, 8_192):
        x, w = draw(size, size), draw(size, size, seed=1)
        seconds = measure_seconds(jax.jit(lambda x, w: x @ w), x, w, repeats=20)
        yield {"size": size, "dtype": "bfloat16"} | rate(2.0 * size**3, seconds, 0)


def _draw_sizes(rows: int, groups: int, how: str):
    """Rows of each group: equal, or as a router that was never balanced would have them."""
    import numpy as np

    share = np.ones(groups) if how == "balanced" else np.arange(1, groups + 1) ** -0.7
    size = np.floor(rows * share / share.sum()).astype(np.int32)
    size[0] += rows - size.sum()
    return size


def multiply_groups(small: bool, dense: float) -> Iterator[Line]:
    """Grouped products at K2's widths, forward and backward, beside XLA's and tokamax'."""
    import functools

    import jax
    import jax.numpy as jnp

    from k2jax.ops.moe import grouped_matmul
    from k2jax.ops.mosaic import is_chosen

    groups, width, hidden = (4, 64, 128) if small else (12, 7_168, 2_048)
    ways: dict[str, Callable] = {"k2jax": grouped_matmul, "jax.lax.ragged_dot": jax.lax.ragged_dot}
    if has_mosaic := is_chosen():
        ways[TRITON] = functools.partial(grouped_matmul)  # one of its own, traced anew
    if importlib.util.find_spec("tokamax"):
        import tokamax

        ways["tokamax"] = lambda x, w, size: tokamax.ragged_dot(lhs=x, rhs=w, group_sizes=size)

    for rows in (256,) if small else (65_536, 8_192, 32_768):
        for how in ("balanced", "skewed"):
            size = jnp.asarray(_draw_sizes(rows, groups, how))
            x, w, dy = draw(rows, width), draw(groups, width, hidden), draw(rows, hidden)
            for way, product in ways.items():
                line = {"rows": rows, "sizes": how, "way": way}
                _choose_kernels(way, has_mosaic)
                try:
                    yield line | _time_product(product, x, w, size, dy, dense)
                except Exception as error:  # a peer may not take these sizes
                    yield line | {"refused": _first_line(error)}


def _choose_kernels(way: str, has_mosaic: bool) -> None:
    """Set what is traced from now on, in this process."""
    from k2jax.ops.mosaic import SWITCH

    os.environ[SWITCH] = str(int(has_mosaic and way != TRITON))


def _time_product(product: Callable, x, w, size, dy, dense: float) -> Line:
    import jax

    def backward(x, w, size, dy):
        return jax.vjp(lambda x, w: product(x, w, size), x, w)[1](dy)

    flops = 2.0 * x.shape[0] * x.shape[1] * w.shape[-1]
    forward = rate(flops, measure_seconds(jax.jit(product), x, w, size), dense)
    both = rate(2 * flops, measure_seconds(jax.jit(backward), x, w, size, dy), dense)
    return {"forward": forward, "backward": both}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def attend(small: bool, dense: float) -> Iterator[Line]:
    """Causal attention at K2's widths, forward and backward, beside cuDNN's."""
    import functools

    import jax
    import jax.numpy as jnp

    from k2jax.ops.attention import blockwise_attention
    from k2jax.ops.mosaic import is_chosen

    has_mosaic = is_chosen()
    heads, wide, narrow = (2, 32, 16) if small else (64, 192, 128)
    for length in (1_024,) if small else (4_096, 32_768):
        shapes = ((1, heads, length, width) for width in (wide, wide, narrow))
        q, k, v = (draw(*shape, seed=i) for i, shape in enumerate(shapes))
        segment, scale = jnp.ones((1, length), jnp.int32), wide**-0.5

        def ours(q, k, v, segment=segment, scale=scale):
            return blockwise_attention(q, k, v, segment, scale)[0]

        def theirs(q, k, v, scale=scale, implementation="cudnn"):
            # cuDNN knows one width of a head: values are padded to it.
            v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - v.shape[-1])))
            q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
            y = jax.nn.dot_product_attention(
                q, k, v, scale=scale, is_causal=True, implementation=implementation
            )
            return y.swapaxes(1, 2)

        peer = functools.partial(theirs, implementation="xla" if small else "cudnn")
        flops = 2.0 * heads * (wide + narrow) * length * (length + 1) / 2
        ways: dict[str, Callable] = {"k2jax": ours, "jax.nn.dot_product_attention": peer}
        if has_mosaic:
            ways[TRITON] = functools.partial(ours, scale=scale)
        for way, run in ways.items():
            _choose_kernels(way, has_mosaic)

            def backward(q, k, v, run=run):
                y, back = jax.vjp(run, q, k, v)
                return back(y)

            line = {"length": length, "heads": heads, "widths": [wide, narrow], "way": way}
            try:
                forward = rate(flops, measure_seconds(jax.jit(run), q, k, v), dense)
                both = rate(3.5 * flops, measure_seconds(jax.jit(backward), q, k, v), dense)
                yield line | {"forward": forward, "forward_and_backward": both}
            except Exception as error:  # widths that it does not take
                yield line | {"refused": _first_line(error)}


def orthogonalise(small: bool, dense: float) -> Iterator[Line]:
    """Newton-Schulz of K2's experts; FLOPs of the standard form for both."""
    import functools

    import jax

    from k2jax.optim.newton_schulz import RESTARTS, newton_schulz

    count, rows, columns = (2, 64, 128) if small else (32, 2_048, 7_168)
    x = draw(count, rows, columns)
    flops = 5.0 * count * (4 * rows**2 * columns + 2 * rows**3)
    for way, gram in {"standard": None, "gram": RESTARTS}.items():
        run = jax.jit(functools.partial(newton_schulz, gram=gram))
        yield {"shape": [count, rows, columns], "way": way} | (
            rate(flops, measure_seconds(run, x, repeats=3), dense)
        )


def train_layer(small: bool, dense: float) -> Iterator[Line]:
    """A training step of one mixture layer of K2's widths, 12 experts of it."""
    import dataclasses

    import jax
    import numpy as np

    from k2jax.config import MeshConfig
    from k2jax.configs import load
    from k2jax.model import Batch
    from k2jax.params.arrays import initial
    from k2jax.params.counts import count_flops
    from k2jax.training.step import build

    run = load("tiny" if small else "kimi_k2")
    rows, context = (2, 64) if small else (4, 4_096)
    model = dataclasses.replace(
        run.model, moe_layers=1, dense_layers=0, experts=12, vocab=1_024, context=context
    )
    run = dataclasses.replace(
        run,
        model=model,
        mesh=MeshConfig(),
        data=dataclasses.replace(run.data, rows=rows, context=context),
        train=dataclasses.replace(
            run.train, accumulate=1, dispatch="allgather", dtype="bfloat16", remat="none"
        ),
    )
    program = build(run)
    state = program.init(initial(program.specs, 0, 0.006))
    ids = np.random.default_rng(0).integers(0, model.vocab, (1, rows, context), dtype=np.int32)
    ones, order = np.ones_like(ids), np.broadcast_to(np.arange(context, dtype=np.int32), ids.shape)
    batch = Batch(ids, ids, ones.astype(np.float32), ones, order)
    step = jax.jit(program.step, donate_argnums=0)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    flops = count_flops(model, context)["train_flops_per_token"] * rows * context
    yield {"tokens": rows * context, "experts": 12, "loss": float(metrics["loss"])} | (
        rate(flops, statistics.median(seconds[2:]), dense)
    )


def decode_layer(small: bool, dense: float) -> Iterator[Line]:
    """A layer's experts for few rows: bytes of weights that are read a second."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from k2jax.ops.lowbit import Fp8, Int4
    from k2jax.ops.moe import resident_mlp

    experts, width, hidden = (4, 256, 128) if small else (48, 7_168, 2_048)

    def make(form: str, rows: int, columns: int):
        shape = (1, experts, rows, columns)
        if form == "bfloat16":
            return jnp.ones(shape, jnp.bfloat16) * 0.01
        if form == "fp8":
            scale = jnp.ones((1, experts, -(-rows // 128), -(-columns // 128)), jnp.float32)
            return Fp8(jnp.ones(shape, jnp.float8_e4m3fn), scale * 0.01)
        word = jnp.full((1, experts, rows // 8, columns), 0x12345678, jnp.int32)
        return Int4(word, jnp.full((1, experts, rows // 32, columns), 0.01, jnp.bfloat16))

    for form in ("bfloat16", "fp8", "int4"):
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        stacks = tuple(make(form, *shape) for shape in shapes)
        for rows in (experts, 8 * experts):
            x, weight = draw(rows, width), jnp.ones((rows, 1), jnp.float32)
            size = jnp.asarray(np.full(experts, rows // experts), jnp.int32)
            run = jax.jit(lambda x, weight, stacks, size: resident_mlp(x, weight, stacks, 0, size))
            seconds = measure_seconds(run, x, weight, stacks, size, repeats=20)
            read = sum(a.nbytes for a in jax.tree.leaves(stacks))
            yield {"weights": form, "experts": experts, "rows": rows} | (
                {"ms": round(1e3 * seconds, 3), "bytes_per_second": read / seconds}
            )


def run_tests(small: bool, dense: float) -> Iterator[Line]:
    """The tests of kernels that are marked `device`, on this device."""
    import jax

    platform = jax.devices()[0].platform
    command = [sys.executable, "-m", "pytest", "-q", "-m", "device", "-p", "no:cacheprovider"]
    chosen = ["tests/ops/moe/test_grouped.py", "-k", "xla"] if small else ["tests/ops"]
    env = os.environ | {"K2JAX_TEST_PLATFORM": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ran = subprocess.run(
        [*command, *chosen], check=False, cwd=ROOT, env=env, capture_output=True, text=True
    )
    lines = ran.stdout.strip().splitlines()
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield {"platform": platform, "summary": lines[-1] if lines else "", "failed": failed[:20]}


def train_small(small: bool, dense: float) -> Iterator[Line]:
    """`tiny` and `small` for 50 steps; `tiny` beside the CPU's curve of the same steps."""
    steps = 2 if small else 50
    with tempfile.TemporaryDirectory() as folder:
        started = {}
        for name, platform in (("tiny", "cpu"), ("tiny", ""), ("small", "")):
            if small and (name, platform) != ("tiny", ""):
                continue
            out = Path(folder, f"{name}-{platform or 'device'}")
            started[name, platform] = out, _start_training(name, platform, steps, out)
            if platform != "cpu":
                started[name, platform][1].wait()
        for _, process in started.values():
            process.wait()
        losses = {key: _read_losses(out) for key, (out, _) in started.items()}
        for (name, platform), curve in losses.items():
            if len(curve) < steps:
                raise RuntimeError(f"{name} took {len(curve)} of {steps} steps")
            line = {"config": name, "on": platform or "device", "steps": len(curve)}
            peer = losses.get((name, "cpu"))
            if peer and not platform and curve:
                line["furthest_from_cpu"] = max(
                    abs(a - b) for a, b in zip(curve, peer, strict=False)
                )
            yield line | {"losses": [round(x, 5) for x in curve[:: max(1, steps // 10)]]}


def _start_training(name: str, platform: str, steps: int, out: Path) -> subprocess.Popen:
    axes = [f"--mesh.{axis}=1" for axis in ("data", "expert", "model")]
    sizes = SMALL_RUN if steps < 10 else []
    command = [sys.executable, "-m", "k2jax.cli", "train", name, f"--train.steps={steps}"]
    more = [*axes, *sizes, "--train.eval_every=0", f"--out={out}"]
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    env |= {"JAX_PLATFORMS": platform} if platform else {}
    return subprocess.Popen(
        command + more, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _read_losses(out: Path) -> list[float]:
    file = out / "metrics.jsonl"
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    return [line["loss"] for line in lines if "loss" in line]


PARTS = {
    "versions": Part(name_versions, 0, 60),
    "kernel check": Part(check_kernels, 10, 90),
    "dense product": Part(multiply_dense, 10, 60),
    "grouped products": Part(multiply_groups, 20, 150),
    "attention": Part(attend, 20, 120),
    "mixture layer": Part(train_layer, 20, 120),
    "low-bit decoding": Part(decode_layer, 15, 90),
    "Newton-Schulz": Part(orthogonalise, 15, 90),
    "tests": Part(run_tests, 30, 150),
    "small runs": Part(train_small, 40, 240),
}
