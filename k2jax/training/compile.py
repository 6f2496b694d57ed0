"""Compiles a run's programs in a thread, while the data is read and the weights are drawn."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from k2jax import cluster
from k2jax.runtime import memory
from k2jax.training.step import Program

Compiled = jax.stages.Compiled


class Programs:
    """The step, compiled from now on, and the evaluation, from when it is asked for."""

    def __init__(self, program: Program, pool: ThreadPoolExecutor):
        """Start to compile the step for the mesh in use, in a thread of `pool`."""
        mesh = jax.sharding.get_mesh()
        self.step = pool.submit(compile_step, program, mesh)
        self.start_evaluation: Callable[[], Future[Compiled]] = functools.cache(
            lambda: pool.submit(compile_evaluation, program, mesh)
        )


def wait_until_all_compiled(program: Future[Compiled], topic: str) -> Compiled:
    """Return a compiled program once all processes have it: gloo waits for none longer than 30 s.

    Raises:
        ConfigError: another process ends.
    """
    compiled = program.result()
    cluster.current().require_equal(topic, {})
    return compiled


class InReserve:
    """A program whose temporaries take the same memory at every call on CPU; elsewhere only it."""

    def __init__(self, compiled: Compiled):
        """Reserve the memory."""
        self.compiled, cpu = compiled, jax.default_backend() == "cpu"
        analysis = compiled.memory_analysis() if cpu else None
        size = analysis.temp_size_in_bytes * jax.local_device_count() if analysis else 0
        self.temporaries = memory.Reserve(size)

    def __call__(self, *args: Any) -> Any:
        """Call it and wait for it."""
        with self.temporaries.lend():
            return jax.block_until_ready(self.compiled(*args))

    def close(self) -> None:
        """Give the memory back to the system."""
        self.temporaries.close()


def compile_step(program: Program, mesh: jax.sharding.Mesh) -> Compiled:
    """Compile a run's step for the mesh: from state, batch and ceiling; the state is donated."""
    with jax.set_mesh(mesh):  # once more: this is another thread
        state, batch = program.abstract_state(), program.abstract_batch()
        ceiling = jax.ShapeDtypeStruct((), np.float32, sharding=jax.NamedSharding(mesh, jax.P()))
        step = jax.jit(program.step, donate_argnums=0)
        return compile_lowered(step.lower(state, batch, ceiling))


def compile_evaluation(program: Program, mesh: jax.sharding.Mesh) -> Compiled:
    """Compile a run's held-out loss for the mesh: from weights and the rows of a micro-batch."""
    with jax.set_mesh(mesh):
        params, rows = program.abstract_state().params, program.abstract_rows()
        return compile_lowered(jax.jit(program.evaluate).lower(params, rows))


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """On CPU, compile at -O1: 20% less compile time, same step time."""
    cpu = jax.default_backend() == "cpu"
    compiled = lowered.compile({"xla_backend_optimization_level": "1"} if cpu else {})
    memory.trim_malloc()
    return compiled
