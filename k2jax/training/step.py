"""One training step, as pure functions of arrays."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from k2jax import sharding
from k2jax.config import RunConfig
from k2jax.evals.perplexity import total_loss
from k2jax.model import Aux, Batch, Dispatch, Kimi, hidden, losses, mtp
from k2jax.model.batch import micro_spec
from k2jax.optim import RESTARTS, adamw, balance, muonclip, warmup_stable_decay
from k2jax.params.arrays import Params, abstract, bind
from k2jax.params.declare import specs
from k2jax.params.spec import ParamSpec


class State(NamedTuple):
    """What training carries from step to step."""

    params: Params  # float32
    opt: optax.OptState


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's pure functions; make it with `build`."""

    run: RunConfig
    specs: dict[str, ParamSpec]
    schedule: optax.Schedule
    tx: optax.GradientTransformationExtraArgs

    @property
    def dispatch(self) -> Dispatch:
        """How tokens meet their experts."""
        return Dispatch(self.run.train.dispatch, self.run.train.buffer)

    def init(self, params: Params) -> State:
        """The state before the first step."""
        return State(params, self.tx.init(_split(params, self.specs)[0]))

    def abstract_state(self) -> State:
        """Shapes and layout of the state on the mesh in use."""
        state = jax.eval_shape(self.init, abstract(self.specs))
        if sharding.meshless():
            return state
        # Counts have no layout of their own; without one they would be restored on one device.
        whole = jax.NamedSharding(jax.sharding.get_abstract_mesh(), P())
        return jax.tree.map(
            lambda a: a if a.sharding else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole),
            state,
        )

    def abstract_batch(self) -> Batch:
        """Shapes and layout of one step's batch on the mesh in use."""
        rows, context = self.micro_shape
        return _abstract_rows((self.run.train.accumulate, rows, context), micro_spec())

    def abstract_rows(self) -> Batch:
        """Shapes and layout of the rows that are scored at once: one micro-batch."""
        return _abstract_rows(self.micro_shape, sharding.storage_spec(("batch", "length")))

    @property
    def micro_shape(self) -> tuple[int, int]:
        """Rows and tokens of a micro-batch."""
        return self.run.data.rows // self.run.train.accumulate, self.run.data.context

    def step(
        self, state: State, batch: Batch, ceiling: jax.Array | float = jnp.inf
    ) -> tuple[State, dict[str, jax.Array]]:
        """The next state and the step's metrics.

        A step is refused if the loss, a gradient, a weight, an update or a logit is not finite, or
        the loss above `ceiling`: weights, optimizer state and its counts then stay as they were,
        bit for bit, and the metric `skipped` is 1. Old and new values are chosen between element
        by element, so no second copy of the state is ever there.

        Args:
            state: donated by the training loop.
            batch: each array is [micro-batches, rows, length].
            ceiling: largest loss that is learned from.
        """
        trainable, fixed = _split(state.params, self.specs)
        grads, loss, aux = self._gradients(trainable, fixed, batch)
        updates, opt = self.tx.update(grads, state.opt, trainable, logit_max=aux.logit_max)
        moved = {
            name: balance(self.run.optim.bias_rate).update(
                None, (), bias, expert_load=self._load_of(name, aux)
            )[0]
            for name, bias in fixed.items()
        }
        grad_norm, update_norm = (jnp.sqrt(_squares(tree)) for tree in (grads, updates))
        # NaN is below nothing; a head that saw no token has -inf.
        good = jnp.isfinite(loss) & (loss <= ceiling) & (aux.logit_max.max() < jnp.inf)
        good &= jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        if not self.run.optim.weight_decay:  # else a weight's decay is part of its update
            good &= jnp.isfinite(_squares(trainable))
        new = State(optax.apply_updates(trainable | fixed, updates | moved), opt)
        norms = {"grad_norm": grad_norm, "update_norm": update_norm}
        metrics = self._metrics(loss, aux, norms) | {"skipped": 1.0 - good}
        return _chosen(good, new, state), metrics

    def _gradients(self, trainable: Params, fixed: Params, batch: Batch):
        """Gradients, loss in nats a token, and what the forward passes reported."""
        total = batch.weight.sum()
        share = jax.value_and_grad(functools.partial(self._loss, total=total), has_aux=True)
        if self.run.train.accumulate == 1:
            (_, (loss, aux)), grads = share(trainable, fixed, jax.tree.map(lambda a: a[0], batch))
            return grads, loss, aux

        def add(carry, micro):
            (_, (loss, aux)), grads = share(trainable, fixed, micro)
            old_grads, old_loss, old = carry
            both = Aux(
                jnp.maximum(old.logit_max, aux.logit_max),  # of the whole batch: never a sum
                old.load + aux.load,
                old.aux_loss + aux.aux_loss / self.run.train.accumulate,
                old.dropped + aux.dropped / self.run.train.accumulate,
                old.mtp_loss + aux.mtp_loss,
            )
            return (jax.tree.map(jnp.add, old_grads, grads), old_loss + loss, both), None

        cfg = self.run.model
        nothing = Aux(
            jnp.full((cfg.layers + cfg.mtp_layers, cfg.heads), -jnp.inf),
            jnp.zeros((cfg.moe_layers + cfg.mtp_layers, cfg.experts)),
            jnp.zeros(()),
            jnp.zeros(()),
            jnp.zeros(()),
        )
        start = (jax.tree.map(jnp.zeros_like, trainable), jnp.zeros(()), nothing)
        return jax.lax.scan(add, start, batch)[0]

    def _loss(self, trainable: Params, fixed: Params, batch: Batch, total: jax.Array):
        run = self.run
        w = bind(Kimi(run.model), trainable | fixed, run.train.grad_dtype)
        x_BTD, aux = hidden(w, batch, run.model, run.train.dtype, run.train.remat, self.dispatch)
        nll_BT = losses(w.head, x_BTD, batch.target)
        loss = (nll_BT * batch.weight).sum() / total
        if run.model.mtp_layers:
            aux = self._further(w, x_BTD, batch, aux, total)
        extra = run.optim.aux_loss * aux.aux_loss / run.train.accumulate
        extra += run.optim.mtp_loss * aux.mtp_loss
        return loss + extra, (loss, aux)

    def _further(self, w: Kimi, x_BTD: jax.Array, batch: Batch, aux: Aux, total: jax.Array) -> Aux:
        """`aux` with the MTP layers': their loss is the mean over them [DSV3-TR 2.2, eq. 25]."""
        cfg, train = self.run.model, self.run.train
        found, aux = mtp.mtp_forward(
            w, x_BTD, batch, aux, cfg, train.dtype, train.remat, self.dispatch
        )
        sums = [(losses(w.head, f.x_BTD, f.target) * f.weight).sum() for f in found]
        return aux._replace(mtp_loss=sum(sums) / total / cfg.mtp_layers)

    def _load_of(self, bias: str, aux: Aux) -> jax.Array:
        """The load of the layers that a router bias is of."""
        leaf, dense = self.specs[bias], self.run.model.dense_layers
        return aux.load[leaf.first_layer - dense :][: leaf.shape[0]]

    def _metrics(self, loss, aux: Aux, norms: dict[str, jax.Array]) -> dict[str, jax.Array]:
        load, top_LH = aux.load, aux.logit_max
        # As a float: the count of a 1T model is no int32.
        moved = float(sum(math.prod(s.shape) for s in self.specs.values() if s.group != "bias"))
        metrics = norms | {
            "loss": loss,
            "aux_loss": aux.aux_loss,
            "update_rms": norms["update_norm"] / moved**0.5,
            "logit_max": top_LH.max(),
            "logit_max_layers": top_LH.max(axis=-1),
            "load_max": (load.max(axis=-1) / load.mean(axis=-1)).mean(),
            "load_entropy": _evenness(load).mean(),
            "expert_load": load,
        }
        if self.run.train.dispatch == "alltoall_capacity":
            metrics["dropped"] = aux.dropped
        if self.run.model.mtp_layers:
            metrics["mtp_loss"] = aux.mtp_loss
        if self.run.optim.name == "muonclip":
            clipped_LH = (top_LH > self.run.optim.tau).astype(jnp.float32)
            metrics |= {"clipped": clipped_LH.mean(), "clipped_layers": clipped_LH.mean(axis=-1)}
        return metrics

    def evaluate(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum of the negative log likelihoods in nats, and how many targets counted.

        Args:
            params: weights.
            batch: each array is [rows, length].
        """
        return total_loss(params, batch, self.run.model, self.run.train.dtype, self.dispatch)


def build(run: RunConfig) -> Program:
    """The pure functions of a run."""
    optim = run.optim
    rates = warmup_stable_decay(
        optim.learning_rate, run.train.steps,
        warmup=optim.warmup, decay=optim.decay, final=optim.final_rate,
    )  # fmt: skip
    leaves = specs(Kimi(run.model))
    adam = {"b1": optim.b1, "b2": optim.b2, "eps": optim.eps}
    tx: optax.GradientTransformation
    if optim.name == "adamw":
        tx = adamw(rates, **adam, weight_decay=optim.weight_decay)
    else:
        tx = muonclip(
            rates, specs=leaves, weight_decay=optim.weight_decay, momentum=optim.momentum,
            ns_dtype=optim.ns_dtype, adam=adam, adam_scale=optim.adam_scale, tau=optim.tau,
            nope=run.model.nope, alpha=optim.alpha, momentum_dtype=optim.momentum_dtype,
            polynomial=optim.ns_polynomial, gram=RESTARTS if optim.ns_method == "gram" else None,
            per_head=optim.matrix_view == "per_head",
        )  # fmt: skip
    if optim.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(optim.clip_norm), tx)
    return Program(run, leaves, rates, optax.with_extra_args_support(tx))


def _abstract_rows(shape: tuple[int, ...], layout: P) -> Batch:
    mesh = None if sharding.meshless() else jax.sharding.get_abstract_mesh()
    place = mesh and jax.NamedSharding(mesh, layout)
    array = functools.partial(jax.ShapeDtypeStruct, shape, sharding=place)
    kinds = Batch(*(jnp.int32,) * len(Batch._fields))._replace(weight=jnp.float32)
    return Batch(*map(array, kinds))  # type: ignore[arg-type]


def _split(params: Params, specs: Mapping[str, ParamSpec]) -> tuple[Params, Params]:
    """What gradients move, and the router biases, which only counts move."""
    fixed = {name for name in params if specs[name].group == "bias"}
    return (
        {name: w for name, w in params.items() if name not in fixed},
        {name: params[name] for name in sorted(fixed)},
    )


def _squares(tree: Params) -> jax.Array:
    """Sum of all squares. As products of arrays with themselves, which need no second array."""
    dims = lambda a: "abcdef"[: a.ndim]
    square = lambda a: jnp.einsum(f"{dims(a)},{dims(a)}->", a, a, out_sharding=sharding.spec())
    return sum(map(square, tree.values()), jnp.zeros(()))


def _chosen(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the step is good, else `old`: element by element, so in the old one's memory."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def _evenness(load_LE: jax.Array) -> jax.Array:
    """Entropy of each layer's expert load over its largest value: 1 is even, 0 is one expert."""
    share_LE = load_LE / jnp.maximum(load_LE.sum(axis=-1, keepdims=True), 1.0)
    entropy_L = -jnp.where(share_LE > 0, share_LE * jnp.log(share_LE), 0.0).sum(axis=-1)
    return entropy_L / (math.log(load_LE.shape[-1]) or 1.0)
