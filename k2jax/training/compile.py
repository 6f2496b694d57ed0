"""The programs that a run compiles; the step and the evaluation in a thread, while data is read.

`PROGRAMS` has all of a training run. Its rehearsal (`k2jax plan --rehearse`) compiles each of them
for other machines, and fails where a run compiles a program that is in no list.
"""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax import cluster
from k2jax.model import Model
from k2jax.params.arrays import Params
from k2jax.runtime import memory
from k2jax.training.step import Program

Compiled = jax.stages.Compiled


class RunProgram(NamedTuple):
    """A program as `train` calls it.

    Attributes:
        function: made of the run's pure functions; its name is the program's in XLA's log.
        arguments: abstract arrays on the mesh in use.
        donate: numbers of the arguments that are donated.
        returns_state: whether it returns a state, laid out as `Program.abstract_state`.
        beside: what is on the devices meanwhile and no argument.
    """

    function: Callable[[Program], Callable]
    arguments: Callable[[Program], tuple[Any, ...]]
    donate: tuple[int, ...] = ()
    returns_state: bool = False
    beside: Callable[[Program], Any] = lambda program: ()

    def jit(self, program: Program) -> Any:
        """Return the jitted function."""
        if not self.returns_state:
            return jax.jit(self.function(program), donate_argnums=self.donate)
        # Stated: a counter depends on no input, and would otherwise be stored on one device only.
        layout = jax.tree.map(_state_layout, program.abstract_state())
        return jax.jit(self.function(program), donate_argnums=self.donate, out_shardings=layout)


def _state_layout(leaf: jax.ShapeDtypeStruct) -> jax.NamedSharding:
    spec = leaf.sharding.spec if leaf.sharding else jax.P()
    return jax.NamedSharding(jax.sharding.get_mesh(), spec)


def _step_arguments(program: Program) -> tuple[Any, ...]:
    ceiling = jax.ShapeDtypeStruct((), np.float32, sharding=_replicated())
    return program.abstract_state(), program.abstract_batch(), ceiling


def _replicated() -> jax.NamedSharding:
    return jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P())


def _params(program: Program) -> Params:
    return program.abstract_state().params


def _optimizer(program: Program) -> Any:
    return program.abstract_state().opt


def are_finite(params: Params) -> dict[str, jax.Array]:
    """Whether each weight is finite throughout."""
    return jax.tree.map(lambda w: jnp.isfinite(w).all(), params)


PROGRAMS = {
    "begin": RunProgram(lambda p: p.init, lambda p: (_params(p),), donate=(0,), returns_state=True),
    "step": RunProgram(lambda p: p.step, _step_arguments, donate=(0,)),
    "evaluation": RunProgram(
        lambda p: p.evaluate, lambda p: (_params(p), p.abstract_rows()), beside=_optimizer
    ),
    "learning rate": RunProgram(
        lambda p: p.schedule, lambda p: (jax.ShapeDtypeStruct((), np.int32),)
    ),
    "cast for the sample": RunProgram(lambda p: p.cast, lambda p: (_params(p),), beside=_optimizer),
    "look for non-finite weights": RunProgram(
        lambda p: are_finite, lambda p: (_params(p),), beside=_optimizer
    ),
}


class Programs:
    """The step, compiled from now on, and the evaluation, from when it is asked for."""

    def __init__(self, program: Program, pool: ThreadPoolExecutor):
        """Start to compile the step for the mesh in use, in a thread of `pool`."""
        mesh = jax.sharding.get_mesh()
        self.learning_rate = PROGRAMS["learning rate"].jit(program)
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
    return _compile_on(mesh, PROGRAMS["step"], program)


def compile_evaluation(program: Program, mesh: jax.sharding.Mesh) -> Compiled:
    """Compile a run's held-out loss for the mesh: from weights and the rows of a micro-batch."""
    return _compile_on(mesh, PROGRAMS["evaluation"], program)


def _compile_on(mesh: jax.sharding.Mesh, listed: RunProgram, program: Program) -> Compiled:
    with jax.set_mesh(mesh):  # once more: this is another thread
        return compile_lowered(listed.jit(program).lower(*listed.arguments(program)))


def cast_model(program: Program, model: Model) -> Model:
    """Return a model in the run's compute dtype; to sample it takes half the room of float32."""
    if model.dtype == program.run.train.dtype:
        return model
    cast = PROGRAMS["cast for the sample"].jit(program)
    return dataclasses.replace(model, params=cast(model.params))


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """On CPU, compile at -O1: 20% less compile time, same step time."""
    cpu = jax.default_backend() == "cpu"
    compiled = lowered.compile({"xla_backend_optimization_level": "1"} if cpu else {})
    memory.trim_malloc()
    return compiled
