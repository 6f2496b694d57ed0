"""One step on a policy's samples: draw them where that is due, lay them out, move the weights.

In several processes all compute what the engine samples and the step; process 0 alone asks for
samples, plays the environment, and sends the others the rows.
"""

import base64
import functools
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from k2jax import cluster
from k2jax.data import Batches
from k2jax.model.lora import attach_adapters, merge_adapters
from k2jax.params.arrays import Params
from k2jax.params.kimi import declare_kimi
from k2jax.post.rl_config import RlConfig
from k2jax.post.rl_objective import RlBatch, abstract_rows, empty_rows, put_rows, read_rows
from k2jax.post.rollouts import Sampler
from k2jax.post.samples import (
    Tasks,
    add_curated,
    compute_rewards,
    describe_rewards,
    find_temperature,
    lay_out,
)
from k2jax.training.compile import Compiled, compile_lowered, wait_until_all_compiled
from k2jax.training.step import Program, State

Rows = dict[str, np.ndarray]
PIECE = 1 << 20  # bytes of a message


class PolicySteps:
    """Takes steps; with `rl.updates` above 1, several on the samples of one policy."""

    def __init__(
        self,
        program: Program,
        rl: RlConfig,
        sampler: Sampler,
        tasks: Tasks,
        curated: Batches | None,
        pool: ThreadPoolExecutor,
    ):
        """Start to compile the step, in a thread of `pool`.

        Args:
            program: of the run, with the objective of samples.
            rl: how it learns.
            sampler: its engine holds nothing yet that is worth keeping.
            tasks: of every step.
            curated: rows for the PTX loss; None: there is none.
            pool: of one thread.
        """
        self.program, self.rl, self.sampler, self.tasks = program, rl, sampler, tasks
        self.curated = curated
        self._is_ready = False
        self._waiting: list[tuple[Rows, dict[str, float]]] = []  # of the steps to come
        mesh = jax.sharding.get_mesh()
        self._score = jax.jit(self._read_old, out_shardings=jax.NamedSharding(mesh, jax.P()))
        self._compiled: Future[Compiled] = pool.submit(self._compile, mesh)

    def _compile(self, mesh: jax.sharding.Mesh) -> Compiled:
        run = self.program.run
        with jax.set_mesh(mesh):  # once more: this is another thread
            rows = run.data.rows + (self.rl.ptx_rows if self.rl.ptx else 0)
            sizes = run.data.context, run.train.accumulate, run.model
            batch = abstract_rows(rows, *sizes)
            ceiling = jax.ShapeDtypeStruct(
                (), np.float32, sharding=jax.NamedSharding(mesh, jax.P())
            )
            step = jax.jit(self.program.step, donate_argnums=0)
            return compile_lowered(step.lower(self.program.abstract_state(), batch, ceiling))

    def take(self, state: State, batch: Rows) -> tuple[State, dict[str, Any]]:
        """Take the step (0, 1, ...) in `batch`; the state is donated."""
        step, run, began = int(batch["number"]), self.program.run, time.perf_counter()
        if step % self.rl.updates == 0:
            self._draw(state.params, step)
        rows, metrics = self._waiting.pop(0)
        sampled = time.perf_counter() - began
        if self.curated:
            curated = dict(self.curated.batch(step))
            rows = add_curated(rows, curated, run)
        compiled = self._wait_for_step()
        on_devices = put_rows(rows, run.train.accumulate)
        state, measured = compiled(state, on_devices, np.float32(np.inf))
        jax.block_until_ready(measured)
        seconds = time.perf_counter() - began
        speed = {"sample_seconds": sampled, "samples_per_second": run.data.rows / seconds}
        return state, measured | metrics | speed

    def _wait_for_step(self) -> Compiled:
        compiled = self._compiled.result()
        if not self._is_ready:
            wait_until_all_compiled(self._compiled, "compiled step")
            self._is_ready = True
        return compiled

    def _draw(self, params: Params, first: int) -> None:
        """Draw the samples of the steps from `first` on that learn from these weights."""
        run, rl = self.program.run, self.rl
        engine, group = self.sampler.engine, cluster.current()
        self.set_weights(params)
        self._waiting.clear()
        for step in range(first, min(first + rl.updates, run.train.steps)):
            drawn = engine.lead(functools.partial(self._sample, step))
            metrics = group.tell(f"metrics of step {step}", drawn and drawn[1])
            rows = drawn[0] if drawn else empty_rows(run.data.rows, run.data.context, run.model)
            share_rows(rows, step)
            if step > first:  # by then the weights have moved
                rows["fresh"][:] = 0.0
                old = self._score(params, put_rows(rows, run.train.accumulate))
                rows["old"] = np.asarray(old).reshape(rows["old"].shape)
            self._waiting.append((rows, metrics | {"policy_step": float(first)}))

    def set_weights(self, params: Params) -> None:
        """Let the engine compute with these weights, to which adapters are added."""
        run = self.program.run
        merged = merge_adapters(params, declare_kimi(run.model), run.lora.scale)
        self.sampler.engine.set_weights(merged)

    def _sample(self, step: int) -> tuple[Rows, dict[str, float]]:
        """Draw the samples of a step, in process 0: rewards need not be the same twice."""
        run, rl = self.program.run, self.rl
        temperature = find_temperature(rl, step, run.train.steps)
        rollouts = self.sampler.sample("train", self.tasks.of_step(step), temperature)
        reward_GK = compute_rewards(rollouts, rl, step, run.data.seed)
        metrics = describe_rewards(rollouts, reward_GK) | {"temperature": temperature}
        return lay_out(rollouts, reward_GK, rl, run, temperature), metrics

    def _read_old(self, params: Params, batch: RlBatch) -> jax.Array:
        """Compute the log-probabilities of the targets, by micro-batches."""
        run = self.program.run
        weights = attach_adapters(params, run.lora.scale)

        def read(batch: RlBatch) -> jax.Array:
            return read_rows(weights, batch, run, self.rl, "none")[0][1]

        return jax.lax.map(read, batch)


def share_rows(rows: Rows, step: int) -> None:
    """Send the rows of process 0 to all others, which write them into their own of the same shapes.

    By messages: samples may take longer than a collective waits.
    """
    group = cluster.current()
    for name, array in rows.items() if group.count > 1 else ():
        content = array.reshape(-1).view(np.uint8)
        for first in range(0, content.size, PIECE):
            piece = content[first : first + PIECE]
            text = base64.b64encode(piece.tobytes()).decode() if group.number == 0 else ""
            text = group.tell(f"{name} of step {step} from byte {first}", text)
            piece[:] = np.frombuffer(base64.b64decode(text), np.uint8)
