"""One step on a policy's samples: draw them where that is due, lay them out, move the weights."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from k2jax.data import Batches
from k2jax.model import Batch, Dispatch, Kimi, Policy, hidden
from k2jax.params.arrays import Params, bind
from k2jax.post.rl_config import RlConfig
from k2jax.post.rl_objective import RlBatch, abstract_rows, is_tempered, put_rows, read_logprobs
from k2jax.post.rollouts import Sampler
from k2jax.post.samples import (
    Tasks,
    add_curated,
    compute_rewards,
    describe_rewards,
    find_temperature,
    lay_out,
)
from k2jax.training.compile import Compiled, compile_lowered
from k2jax.training.step import Program, State

Rows = dict[str, np.ndarray]


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
        self._waiting: list[tuple[Rows, dict[str, float]]] = []  # of the steps to come
        self._score = jax.jit(self._read_old)
        mesh = jax.sharding.get_mesh()
        self._compiled: Future[Compiled] = pool.submit(self._compile, mesh)

    def _compile(self, mesh: jax.sharding.Mesh) -> Compiled:
        run = self.program.run
        with jax.set_mesh(mesh):  # once more: this is another thread
            rows = run.data.rows + (self.rl.ptx_rows if self.rl.ptx else 0)
            batch = abstract_rows(rows, run.data.context, run.train.accumulate)
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
            rows = add_curated(rows, curated, run.train.accumulate)
        compiled = self._compiled.result()
        on_devices = put_rows(rows, run.train.accumulate)
        state, measured = compiled(state, on_devices, np.float32(np.inf))
        jax.block_until_ready(measured)
        seconds = time.perf_counter() - began
        speed = {"sample_seconds": sampled, "samples_per_second": run.data.rows / seconds}
        return state, measured | metrics | speed

    def _draw(self, params: Params, first: int) -> None:
        """Draw the samples of the steps from `first` on that learn from these weights."""
        run, rl = self.program.run, self.rl
        self.sampler.engine.set_weights(params)
        self._waiting.clear()
        for step in range(first, min(first + rl.updates, run.train.steps)):
            temperature = find_temperature(rl, step, run.train.steps)
            rollouts = self.sampler.sample("train", self.tasks.of_step(step), temperature)
            reward_GK = compute_rewards(rollouts, rl, step, run.data.seed)
            rows = lay_out(rollouts, reward_GK, rl, run.data.context, temperature)
            if step > first:  # by then the weights have moved
                rows["fresh"][:] = 0.0
                old = self._score(params, put_rows(rows, run.train.accumulate))
                rows["old"] = np.asarray(old).reshape(rows["old"].shape)
            metrics = describe_rewards(rollouts, reward_GK) | {"temperature": temperature}
            self._waiting.append((rows, metrics | {"policy_step": float(first)}))

    def _read_old(self, params: Params, batch: RlBatch) -> jax.Array:
        """Compute the log-probabilities of the targets, by micro-batches."""
        run = self.program.run
        dispatch = Dispatch(run.train.dispatch, run.train.buffer)
        policy = Policy(run.train.dtype, run.train.grad_dtype, "none", dispatch)
        w = bind(Kimi(run.model), params)

        def read(batch: RlBatch) -> jax.Array:
            rows = Batch(batch.token, batch.target, batch.weight, batch.segment, batch.position)
            x_BTD, _ = hidden(w, rows, run.model, policy)
            return read_logprobs(w, x_BTD, batch, policy, is_tempered(self.rl))[1]

        return jax.lax.map(read, batch)
