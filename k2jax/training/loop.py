"""The training loop: from text and a config to checkpoints, metrics, a plot and a sample."""

import contextlib
import dataclasses
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from k2jax import cluster, sharding
from k2jax.checkpoint import Checkpoints, preload_orbax
from k2jax.config import ConfigError, RunConfig, from_json, to_json
from k2jax.data import Batches, Data, Mixture, check, compressors, open_data, prefetch
from k2jax.evals.perplexity import heldout_loss
from k2jax.inference.generate import generate
from k2jax.model import Model
from k2jax.model.batch import own_parts, to_devices
from k2jax.model.kernel_check import check_kernels
from k2jax.params.arrays import initial
from k2jax.runtime import memory
from k2jax.runtime.files import OUTSIDE, write_atomic
from k2jax.runtime.signals import Stop, Stopped
from k2jax.training import provenance, trackers
from k2jax.training.dashboard import Dashboard
from k2jax.training.metrics import Metrics, plot
from k2jax.training.recovery import Watch, profiler, speed_of, timed
from k2jax.training.saver import Saves
from k2jax.training.step import Program, State, build
from k2jax.weights.source import initial_params, open_source

Say = Callable[[str], None]
PROMPT = "def "
PLOT = "loss.png"  # the last thing that a run leaves


def train(
    run: RunConfig, out: str | Path, *, init: str = "", say: Say = print, began: float | None = None
) -> Model:
    """Train to `run.train.steps`, or go on from the newest checkpoint in `out`.

    Leaves in `out`: `checkpoints/`, `metrics.jsonl` (one line a step), `loss.png`, `config.json`,
    `run.json` (one entry a start), `tiktoken.model`. SIGTERM saves and returns.

    Args:
        run: validated.
        out: folder of the run.
        init: weights to start from; a checkpoint in `out` wins over it.
        say: told each line worth printing.
        began: when the command started, on `time.perf_counter`'s clock; now, if not given.

    Returns:
        The trained model, on the mesh of the run.

    Raises:
        ConfigError: the run cannot work here; nothing that was saved is lost.
    """
    out = Path(out)
    began = time.perf_counter() if began is None else began
    with jax.set_mesh(sharding.make_mesh(run.mesh)):
        try:
            return _Training(run, out, say, began).go(init)
        except OSError as error:
            if error.errno not in OUTSIDE:
                raise
            raise ConfigError(f"{error.filename or out}: {error.strerror}") from error


class _Training:
    """One call of `train`: what its parts share."""

    def __init__(self, run: RunConfig, out: Path, say: Say, began: float):
        self.run, self.out, self.began = run, out, began
        self.first = jax.process_index() == 0  # the others print and write nothing but checkpoints
        self.say = say if self.first else lambda line: None
        self.program: Program = build(run)
        sharding.check_divisible(self.program.specs, run.mesh, run.data.context)
        trackers.check(run)
        self.watch = Watch(run, out, self.say)

    def go(self, init: str) -> Model:
        with (
            Checkpoints(self.out, self.run.train.keep, self.run.train.keep_every) as saved,
            Stop() as stop,
            ThreadPoolExecutor(1) as pool,
        ):
            latest = saved.recover(self.say)
            cluster.current().require_equal("where to begin", {"newest step in --out": latest})
            if latest is not None:
                _check_same(self.run, saved.meta(latest)["config"], self.out)
            words = (self.run.data.path, self.run.data.tokenizer, self.run.model.vocab)
            self._check(words, init, latest)
            # Compiling takes longest, so it starts before the rest and the data is read beside it.
            programs = _Programs(self.program, pool)
            preload_orbax()
            data = _open_alike(*words, progress=self.say)
            self._describe(data)
            state, step = self._start(saved, latest, init)
            if step < self.run.train.steps:
                provenance.record(self.run, self.out, step)
            while step < self.run.train.steps:
                state, step = self._steps(state, step, data, programs, saved, stop)
                if self.watch.back is None:
                    break
                jax.tree.map(lambda a: a.delete(), state)  # there is no room for two
                state, step = self._start(saved, self.watch.back, "")
            if step < self.run.train.steps:
                self.say(f"stopped and saved at step {step}; the same command goes on from there")
            elif step == latest and (self.out / PLOT).exists():
                self.say(f"{self.out} is finished: step {step}; more --train.steps would go on")
            else:
                self._finish(state, data, programs, stop)
            return Model(self.run.model, state.params, data.tokenizer)

    def _check(self, words: tuple[str, str, int], init: str, latest: int | None) -> None:
        """Mistakes first: compiling cannot be interrupted."""
        check(*words)
        if self.first:
            self.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.out).close()
        if jax.default_backend() != "cpu":
            check_kernels(self.program.dispatch, self.run.model, self.run.data.context)
        if init and latest is None:
            open_source(init)
        elif init:
            self.say(f"--init {init} is not used: {self.out} has a checkpoint")

    def _describe(self, data: Data) -> None:
        if not self.first:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        data.tokenizer.save(self.out / "tiktoken.model")
        write_atomic(self.out / "config.json", json.dumps(to_json(self.run), indent=1) + "\n")
        count = sum(math.prod(leaf.shape) for leaf in self.program.specs.values())
        self.say(
            f"{self.run.name}: {count / 1e6:.1f}M parameters on {self.run.mesh};"
            f" {data.train.size / 1e6:.2f}M tokens of {data.title},"
            f" {data.heldout_bytes:,} bytes held out"
        )

    def _start(self, saved: Checkpoints, latest: int | None, init: str) -> tuple[State, int]:
        """Where training begins: the newest checkpoint, given weights, or drawn ones."""
        if latest is not None:
            abstract = self.program.abstract_state()
            self.say(f"going on from step {latest} in {self.out}")
            return State(**saved.restore(latest, abstract._asdict())), latest
        specs = self.program.specs
        if init:
            params = initial_params(init, specs)
        else:
            params = initial(specs, self.run.train.seed, self.run.model.init_std)
        # Said outright: a counter depends on no input, and would else rest on one device only.
        mesh = jax.sharding.get_mesh()
        rest = jax.tree.map(
            lambda a: jax.NamedSharding(mesh, a.sharding.spec if a.sharding else jax.P()),
            self.program.abstract_state(),
        )
        return jax.jit(self.program.init, donate_argnums=0, out_shardings=rest)(params), 0

    def _steps(
        self, state: State, start: int, data: Data, programs: "_Programs",
        saved: Checkpoints, stop: Stop,
    ) -> tuple[State, int]:  # fmt: skip
        """Steps until the last one or a signal; the state is saved at the end."""
        run, watch = self.run, self.watch
        watch.begin(saved.meta(start) if start else {})
        batches = Batches(data.train, run.data.rows, run.data.context, run.data.seed)
        self._say_epochs(data, batches)
        own = own_parts(run.train.accumulate)  # here: `fetch` runs in a thread without the mesh
        fetch = lambda step: batches.batch(watch.order.index(step), **own)
        step_fn = _together(programs.step, "compiled step")
        rows: Any = contextlib.closing(prefetch(fetch, start, run.train.steps - start))  # type: ignore[type-var]
        file = self.out / "metrics.jsonl" if self.first else None
        metrics = Metrics(file, start, self.program.schedule, self.say)
        saves = Saves(saved, self.say)
        progress = Dashboard(run, start, self.say, self.began)
        speed, step = speed_of(run), start
        with (
            rows as ready, metrics, progress, trackers.opened(run, self.out, start) as track,
            profiler(run, self.out, watch.events) as profile,
        ):  # fmt: skip
            for batch, waited in timed(ready):
                profile(step + 1)
                began = time.perf_counter()
                state, found = step_fn(
                    state,
                    to_devices(batch, run.train.accumulate),
                    np.float32(watch.health.ceiling),
                )
                step += 1
                values = numbers(found)
                values |= speed.of(time.perf_counter() - began, waited) | saves.told()
                verdict = watch.judge(step, values)
                if watch.goes_back(step, verdict, saves):
                    stop.after_step()
                    break
                if self._due(step, run.train.eval_every):
                    values |= self._heldout(state, data, programs, run.train.eval_rows)
                line = metrics.write(step, values, watch.applied(step, verdict))
                progress.show(step, values, watch.health.skipped, watch.health.spikes)
                track(line)
                if watch.health.lost:
                    raise ConfigError(watch.lost(step, values["loss"], state.params, batch))
                stopping = stop.after_step()
                if self._due(step, run.train.save_every) or stopping:
                    meta = {"config": to_json(run)} | watch.meta(step)
                    saves.save(step, state._asdict(), meta)
                if stopping:
                    break
                programs.evaluate()  # compiles from here on; it would have slowed the first step
        saves.finish(state._asdict())
        return state, step

    def _say_epochs(self, data: Data, batches: Batches) -> None:
        if isinstance(data.train, Mixture):
            epochs = batches.epochs(self.watch.order.index(self.run.train.steps))
            told = (f"{name} {n:.2f}" for name, n in zip(data.train.names, epochs, strict=True))
            self.say("epochs in all: " + ", ".join(told))

    def _due(self, step: int, every: int) -> bool:
        return step == self.run.train.steps or bool(every and step % every == 0)

    def _heldout(
        self, state: State, data: Data, programs: "_Programs", limit: int
    ) -> dict[str, float]:
        """Nats per token and bits per byte of held-out rows; `limit` 0 takes all of them."""
        evaluate = _together(programs.evaluate(), "compiled evaluation")
        found = heldout_loss(
            functools.partial(evaluate, state.params), data.heldout, *self.program.micro_shape,
            data.tokenizer.byte_lengths(), limit=limit,
        )  # fmt: skip
        return {
            "heldout_loss": found.nats_per_token, "heldout_bits_per_byte": found.bits_per_byte
        }  # fmt: skip

    def _finish(self, state: State, data: Data, programs: "_Programs", stop: Stop) -> None:
        """Score all held-out text beside compressors, plot, and print a sample, unless stopped."""
        try:
            stop.at_once()
            self._look_back(state, data, programs)
        except Stopped:
            steps = self.run.train.steps
            self.say(f"stopped; step {steps} is saved, and the same command plots and samples it")

    def _look_back(self, state: State, data: Data, programs: "_Programs") -> None:
        found = self._heldout(state, data, programs, limit=0)
        model = Model(self.run.model, state.params, data.tokenizer)
        ids = generate(model, [PROMPT], max_new_tokens=min(64, self.run.model.context // 2))[0]
        if not self.first:
            return
        packed = compressors(data.heldout_texts())
        bits = found["heldout_bits_per_byte"]
        self.say(
            f"held out: {bits:.4f} bits per byte, {found['heldout_loss']:.4f} nats per token"
            f" (gzip -9: {packed['gzip']:.4f}, xz -9: {packed['xz']:.4f} bits per byte)"
        )
        plot(self.out / "metrics.jsonl", self.out / PLOT, self.run.name)
        self.say(f"sample:\n{PROMPT}{data.tokenizer.decode(ids)}")
        self.say(
            f"{self.out}: checkpoints, metrics.jsonl, loss.png"
            f" ({time.perf_counter() - self.began:.0f} s in all)"
        )


class _Programs:
    """Compiled in a thread: the step from the start, the evaluation from when it is asked for."""

    def __init__(self, program: Program, pool: ThreadPoolExecutor):
        mesh = jax.sharding.get_mesh()
        self.step: Future[Callable[..., Any]] = pool.submit(compile_step, program, mesh)
        self.evaluate: Callable[[], Future[Callable[..., Any]]] = functools.cache(
            lambda: pool.submit(_compile_evaluate, program, mesh)
        )


def _together(program: Future[Callable[..., Any]], topic: str) -> Callable[..., Any]:
    """A compiled program, once all processes have it: gloo waits for none longer than 30 s."""
    found = program.result()
    cluster.current().require_equal(topic, {})
    return found


def compile_step(program: Program, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    """A run's step for the mesh: from state, batch and ceiling; the state is donated."""
    with jax.set_mesh(mesh):  # once more: this is another thread
        state, batch = program.abstract_state(), program.abstract_batch()
        ceiling = jax.ShapeDtypeStruct((), np.float32, sharding=jax.NamedSharding(mesh, jax.P()))
        step = jax.jit(program.step, donate_argnums=0)
        return _compiled(step.lower(state, batch, ceiling))


def _compile_evaluate(program: Program, mesh: jax.sharding.Mesh) -> Callable[..., Any]:
    with jax.set_mesh(mesh):
        params = program.abstract_state().params
        return _compiled(jax.jit(program.evaluate).lower(params, program.abstract_rows()))


def _compiled(lowered: jax.stages.Lowered) -> Callable[..., Any]:
    """On a CPU by LLVM's first level: a fifth less time to compile, and steps are as fast."""
    cpu = jax.default_backend() == "cpu"
    compiled = lowered.compile({"xla_backend_optimization_level": "1"} if cpu else {})
    memory.trim_malloc()
    return compiled


def numbers(found: dict[str, jax.Array]) -> dict[str, Any]:
    """A step's metrics on the host: floats, lists, and the expert load as whole numbers."""
    host: dict[str, np.ndarray] = jax.device_get(found)
    host["expert_load"] = host["expert_load"].astype(int)
    return {name: value.tolist() for name, value in host.items()}


def _open_alike(path: str, tokenizer: str, vocab: int, progress: Say) -> Data:
    """The run's data: process 0 prepares it first, so that a shared cache is filled once."""
    group = cluster.current()
    if group.number:
        group.tell("the data is prepared")
    data = open_data(path, tokenizer, vocab, progress=progress)
    if not group.number:
        group.tell("the data is prepared")
    size, heldout, digest = data.train.size, data.heldout.bytes, data.tokenizer.digest()[:12]
    facts = {"tokenizer": digest, "tokens to learn from": size, "bytes held out": heldout}
    group.require_equal("data", facts)
    return data


def _check_same(run: RunConfig, old: dict[str, Any], out: Path) -> None:
    """Refuse to go on with another model or other data than the checkpoint's.

    Raises:
        ConfigError: names the first field that differs.
    """
    before = from_json(old)
    for section in ("model", "data"):
        for field in dataclasses.fields(getattr(run, section)):
            was = getattr(getattr(before, section), field.name)
            now = getattr(getattr(run, section), field.name)
            if was != now:
                raise ConfigError(
                    f"{out} holds a run with {section}.{field.name} {was}, not {now};"
                    " give another --out"
                )
    if before.optim.name != run.optim.name:
        raise ConfigError(
            f"{out} holds a run with optim.name {before.optim.name}, not {run.optim.name};"
            " give another --out"
        )


def read_metrics(out: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    for line in (Path(out) / "metrics.jsonl").read_text().splitlines():
        yield json.loads(line)
