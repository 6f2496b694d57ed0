"""One training step of any objective, as pure functions of arrays."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from k2jax import sharding
from k2jax.config import RunConfig
from k2jax.evals.perplexity import total_loss
from k2jax.model import Aux, Batch, Dispatch, Kimi
from k2jax.model.batch import micro_spec
from k2jax.model.lora import attach_adapters
from k2jax.optim import RESTARTS, adamw, balance, muonclip, warmup_stable_decay
from k2jax.params.adapters import declare_adapters, freeze
from k2jax.params.arrays import Params, abstract
from k2jax.params.declare import specs
from k2jax.params.matrices import KEYS, QUERIES
from k2jax.params.spec import ParamSpec
from k2jax.training.objective import Objective, language_model

Metrics = dict[str, jax.Array]
NOT_BY_GRADIENTS = ("bias", "frozen")  # groups of parameters


class State(NamedTuple):
    """What training carries from step to step."""

    params: Params  # float32; what is frozen is as it was published
    opt: optax.OptState


Step = Callable[..., tuple[State, Metrics]]  # of a state, a batch and the ceiling of its loss


def make_step(
    objective: Objective,
    tx: optax.GradientTransformationExtraArgs,
    run: RunConfig,
    specs: Mapping[str, ParamSpec],
) -> Step:
    """Make the function `step(state, batch, ceiling=inf) -> (state, metrics)`.

    A step is refused if the loss, a gradient, a weight, an update or a logit is not finite, the
    loss above `ceiling`, or the batch without targets (metric `targets`): weights, optimizer state
    and its counts then stay as they were, bit for bit, and the metric `skipped` is 1. Old and new
    values are chosen between element by element, so the state is never held twice.

    Args:
        objective: what is minimised; see `k2jax.training.objective`.
        tx: moves all weights but the router biases, which move by the experts' load.
        run: micro-batches, the rate of the biases, and which metrics there are.
        specs: of every weight.

    Returns:
        A pure function, to be compiled with its state donated. Each array of `batch` is
        [micro-batches, rows, length]. `metrics` has the objective's own and those of `_measure`;
        its `loss` is the objective's metric of that name, or else what was differentiated.
    """

    def step(
        state: State, batch: Batch, ceiling: jax.Array | float = jnp.inf
    ) -> tuple[State, Metrics]:
        trainable, fixed = split_trainable(state.params, specs)
        grads, aux = compute_gradients(objective, trainable, fixed, batch)
        updates, opt = tx.update(grads, state.opt, trainable, logit_max=aux.logit_max)
        bias_updates = move_biases(run, specs, fixed, aux.load)
        grad_norm, update_norm = (jnp.sqrt(_squares(tree)) for tree in (grads, updates))
        # NaN is below nothing; a head that saw no token has -inf.
        loss = aux.metrics["loss"]
        good = jnp.isfinite(loss) & (loss <= ceiling) & (aux.logit_max.max() < jnp.inf)
        good &= jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        targets = (batch.weight != 0).sum()
        good &= targets > 0
        if not run.optim.weight_decay:  # else a weight's decay is part of its update
            good &= jnp.isfinite(_squares(trainable))
        moving = trainable | {name: fixed[name] for name in bias_updates}
        new = State(optax.apply_updates(moving, updates | bias_updates), opt)
        norms = {"grad_norm": grad_norm, "update_norm": update_norm}
        metrics = _measure(run, specs, aux, norms) | {"skipped": 1.0 - good, "targets": targets}
        moved = _choose(good, new, State(moving, state.opt))
        return moved._replace(
            params={name: state.params[name] for name in fixed} | moved.params
        ), metrics

    return step


def compute_gradients(
    objective: Objective, trainable: Params, fixed: Params, batch: Batch
) -> tuple[Params, Aux]:
    """Return the gradients and what the forward passes reported.

    Gradients, loads and the objective's metrics of micro-batches are added; the largest logits are
    the largest of all, as are metrics whose names end in `_max`, and the other numbers are means.
    The metrics always have a `loss`.

    Args:
        objective: sees weights and one micro-batch, whose `total` is of the whole batch.
        trainable: weights to differentiate by.
        fixed: the other weights.
        batch: each array is [micro-batches, rows, length].
    """
    micros, total = batch.weight.shape[0], batch.weight.sum()

    def loss_of(trainable: Params, micro: Batch):
        loss, aux = objective(trainable | fixed, micro._replace(total=total))
        return loss, aux._replace(metrics={"loss": loss} | aux.metrics)

    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    if micros == 1:
        (_, aux), grads = gradient_of(trainable, jax.tree.map(lambda a: a[0], batch))
        return grads, aux

    def add(carry, micro: Batch):
        (_, aux), grads = gradient_of(trainable, micro)
        old_grads, old = carry
        both = Aux(
            jnp.maximum(old.logit_max, aux.logit_max),  # of the whole batch: never a sum
            old.load + aux.load,
            old.aux_loss + aux.aux_loss / micros,
            old.dropped + aux.dropped / micros,
            _join_metrics(old.metrics, aux.metrics),
        )
        return (jax.tree.map(jnp.add, old_grads, grads), both), None

    first = jax.tree.map(lambda a: a[0], batch)
    _, shapes = jax.eval_shape(loss_of, trainable, first)
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    nothing = nothing._replace(logit_max=jnp.full(shapes.logit_max.shape, -jnp.inf))
    start = (jax.tree.map(jnp.zeros_like, trainable), nothing)
    return jax.lax.scan(add, start, batch)[0]


def _join_metrics(old: Metrics, new: Metrics) -> Metrics:
    """Join those of two micro-batches; largest values are none below 0."""
    return {
        name: jnp.maximum(a, new[name]) if name.endswith("_max") else a + new[name]
        for name, a in old.items()
    }


def split_trainable(params: Params, specs: Mapping[str, ParamSpec]) -> tuple[Params, Params]:
    """Return what gradients move, and the others: router biases, which only counts move."""
    fixed = {name for name in params if specs[name].group in NOT_BY_GRADIENTS}
    return (
        {name: w for name, w in params.items() if name not in fixed},
        {name: params[name] for name in sorted(fixed)},
    )


def move_biases(
    run: RunConfig, specs: Mapping[str, ParamSpec], fixed: Params, load_LE: jax.Array
) -> Params:
    """Return what a step adds to those router biases that move, by the load of their own layers."""
    rule, dense = balance(run.optim.bias_rate), run.model.dense_layers

    def load_of(name: str) -> jax.Array:
        return load_LE[specs[name].first_layer - dense :][: specs[name].shape[0]]

    return {
        name: rule.update(None, (), bias, expert_load=load_of(name))[0]
        for name, bias in fixed.items()
        if specs[name].group == "bias"
    }


def _measure(
    run: RunConfig,
    specs: Mapping[str, ParamSpec],
    aux: Aux,
    norms: Metrics,
) -> Metrics:
    load, top_LH = aux.load, aux.logit_max
    busiest_L, entropy_L = load.max(axis=-1) / load.mean(axis=-1), load_entropy(load)
    # As a float: the count of a 1T model is no int32.
    trainable = (s for s in specs.values() if s.group not in NOT_BY_GRADIENTS)
    trainable_count = float(sum(math.prod(s.shape) for s in trainable))
    metrics = norms | {
        "aux_loss": aux.aux_loss,
        "update_rms": norms["update_norm"] / trainable_count**0.5,
        "logit_max": top_LH.max(),
        "logit_max_layers": top_LH.max(axis=-1),
        "load_max": busiest_L.mean(),
        "load_max_layers": busiest_L,
        "load_entropy": entropy_L.mean(),
        "load_entropy_layers": entropy_L,
        "expert_load": load,
    }
    if run.train.dispatch == "alltoall_capacity":
        metrics["dropped"] = aux.dropped
    if run.optim.name == "muonclip":
        clipped_LH = (top_LH > run.optim.tau).astype(jnp.float32)
        metrics |= {"clipped": clipped_LH.mean(), "clipped_layers": clipped_LH.mean(axis=-1)}
    return metrics | aux.metrics


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's pure functions; make it with `build`.

    Attributes:
        run: the settings.
        specs: of every parameter; with adapters, all others are frozen.
        schedule: learning rate of each step.
        tx: the optimizer.
        objective: what is minimised.
        frozen: shapes, dtypes and layouts of the frozen parameters; empty without adapters.
    """

    run: RunConfig
    specs: dict[str, ParamSpec]
    schedule: optax.Schedule
    tx: optax.GradientTransformationExtraArgs
    objective: Objective
    frozen: Params = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def step(self) -> Step:
        """One step, as `make_step` describes it."""
        return make_step(self.objective, self.tx, self.run, self.specs)

    @property
    def dispatch(self) -> Dispatch:
        """How tokens are sent to their experts."""
        return Dispatch(self.run.train.dispatch, self.run.train.buffer)

    def init(self, params: Params) -> State:
        """Make the state before the first step."""
        return State(params, self.tx.init(split_trainable(params, self.specs)[0]))

    def abstract_state(self) -> State:
        """Describe shapes and layout of the state on the mesh in use."""
        learned = {name: s for name, s in self.specs.items() if name not in self.frozen}
        state = jax.eval_shape(self.init, self.frozen | abstract(learned))
        if sharding.meshless():
            return state
        # Counts have no layout of their own; without one they would be restored on one device.
        whole = jax.NamedSharding(jax.sharding.get_abstract_mesh(), P())
        return jax.tree.map(
            lambda a: a if a.sharding else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
            state,
        )

    def to_save(self, state: State) -> dict[str, Any]:
        """Take the parts of a state that a checkpoint holds: not what is frozen."""
        params = {name: w for name, w in state.params.items() if name not in self.frozen}
        return {"params": params, "opt": state.opt}

    def abstract_batch(self) -> Batch:
        """Describe shapes and layout of one step's batch on the mesh in use."""
        rows, context = self.micro_shape
        return _abstract_rows((self.run.train.accumulate, rows, context), micro_spec())

    def abstract_rows(self) -> Batch:
        """Describe shapes and layout of the rows that are scored at once: one micro-batch."""
        return _abstract_rows(self.micro_shape, sharding.storage_spec(("batch", "length")))

    @property
    def micro_shape(self) -> tuple[int, int]:
        """Rows, and tokens per row, of a micro-batch."""
        return self.run.data.rows // self.run.train.accumulate, self.run.data.context

    def cast(self, params: Params) -> Params:
        """Return weights in the compute dtype; router biases stay float32."""
        return {
            name: w if self.specs[name].group == "bias" else w.astype(self.run.train.dtype)
            for name, w in params.items()
        }

    def evaluate(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum the negative log likelihoods in nats, and count the targets.

        Args:
            params: weights.
            batch: each array is [rows, length].
        """
        params = attach_adapters(params, self.run.lora.scale)
        return total_loss(params, batch, self.run.model, self.run.train.dtype, self.dispatch)


def build(run: RunConfig, objective: Objective | None = None) -> Program:
    """Make the pure functions of a run; its objective is pretraining's unless another is passed.

    With adapters, the other parameters are taken to be float32 until `frozen` is replaced.
    """
    optim = run.optim
    rates = warmup_stable_decay(
        optim.learning_rate,
        run.train.steps,
        warmup=optim.warmup,
        decay=optim.decay,
        final=optim.final_rate,
    )
    base = specs(Kimi(run.model))
    learned = declare_adapters(base, run.lora) or base
    adam = {"b1": optim.b1, "b2": optim.b2, "eps": optim.eps}
    tx: optax.GradientTransformation
    if optim.name == "adamw":
        tx = adamw(rates, **adam, weight_decay=optim.weight_decay)
    else:
        tx = muonclip(
            rates,
            specs=learned,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            ns_dtype=optim.ns_dtype,
            adam=adam,
            adam_scale=optim.adam_scale,
            tau=optim.tau if has_heads_to_clip(learned) else None,
            nope=run.model.nope,
            alpha=optim.alpha,
            momentum_dtype=optim.momentum_dtype,
            polynomial=optim.ns_polynomial,
            gram=RESTARTS if optim.ns_method == "gram" else None,
            per_head=optim.matrix_view == "per_head",
        )
    if optim.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(optim.clip_norm), tx)
    tx = optax.with_extra_args_support(tx)
    objective = objective or language_model(run)
    if learned is base:
        return Program(run, base, rates, tx, objective)
    adapted = adapt_objective(objective, run)
    return Program(run, freeze(base) | learned, rates, tx, adapted, abstract(base))


def adapt_objective(objective: Objective, run: RunConfig) -> Objective:
    """Make an objective of weights one of weights and adapters."""

    def adapted(params: Params, batch: Batch) -> tuple[jax.Array, Aux]:
        return objective(attach_adapters(params, run.lora.scale), batch)

    return adapted


def has_heads_to_clip(learned: Mapping[str, ParamSpec]) -> bool:
    """Whether both queries and keys learn; of adapters, QK-Clip scales these alone."""
    ends = {leaf.axes[-2:] for leaf in learned.values()}
    return bool(ends & set(QUERIES)) and bool(ends & set(KEYS))


def _abstract_rows(shape: tuple[int, ...], layout: P) -> Batch:
    mesh = None if sharding.meshless() else jax.sharding.get_abstract_mesh()
    place = mesh and jax.NamedSharding(mesh, layout)
    ids, weight = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in (jnp.int32, jnp.float32)
    )
    return Batch(ids, ids, weight, ids, ids)  # type: ignore[arg-type]


def _squares(tree: Params) -> jax.Array:
    """Sum all squares: products of arrays with themselves, which need no second array."""

    def square(a: jax.Array) -> jax.Array:
        dims = "abcdef"[: a.ndim]
        return jnp.einsum(f"{dims},{dims}->", a, a, out_sharding=sharding.spec())

    return sum(map(square, tree.values()), jnp.zeros(()))


def _choose(good: jax.Array, new: Any, old: Any) -> Any:
    """Return `new` of a good step, else `old`: element by element, so in the old one's memory."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def load_entropy(load_LE: jax.Array) -> jax.Array:
    """Return each layer's entropy of expert load, [L]: 1 is even, 0 is one expert."""
    share_LE = load_LE / jnp.maximum(load_LE.sum(axis=-1, keepdims=True), 1.0)
    entropy_L = -jnp.where(share_LE > 0, share_LE * jnp.log(share_LE), 0.0).sum(axis=-1)
    return entropy_L / (math.log(load_LE.shape[-1]) or 1.0)
