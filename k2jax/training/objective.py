"""What a step minimises: an objective is a function of weights and a batch.

`language_model` is the one of pretraining. Another one needs no change here:

    def objective(params: Params, batch: Batch) -> tuple[jax.Array, Aux]: ...

    step = make_step(objective, tx, run, specs)

The first result is differentiated. `Aux` is what `k2jax.model.hidden` returned, from which the step
clips attention heads and moves router biases; its `metrics` are the objective's own.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from k2jax.config import RunConfig
from k2jax.model import Aux, Batch, Dispatch, Kimi, Policy, hidden, losses, mtp
from k2jax.params.arrays import Params, bind

Objective = Callable[[Params, Batch], tuple[jax.Array, Aux]]


def language_model(run: RunConfig) -> Objective:
    """Make the objective of pretraining: cross-entropy, balance loss and MTP loss, weighted.

    Its metrics are `loss`, the cross-entropy alone in nats per token, and with MTP layers
    `mtp_loss`, the mean over them before its weight [DSV3-TR 2.2, eq. 25]. With micro-batches each
    is that micro-batch's share of the step's.
    """
    cfg, optim, train = run.model, run.optim, run.train
    dispatch = Dispatch(train.dispatch, train.buffer)
    policy = Policy(train.dtype, train.grad_dtype, train.remat, dispatch)

    def objective(params: Params, batch: Batch) -> tuple[jax.Array, Aux]:
        total = batch.weight.sum() if batch.total is None else batch.total
        total = jnp.maximum(total, 1.0)  # a mean over no targets is 0
        w = bind(Kimi(cfg), params)
        x_BTD, aux = hidden(w, batch, cfg, policy)
        nll_BT = losses(w.head, x_BTD, batch.target, policy)
        loss = (nll_BT * batch.weight).sum() / total
        metrics = {"loss": loss}
        if cfg.mtp_layers:
            outputs, aux = mtp.mtp_forward(w, x_BTD, batch, aux, cfg, policy)
            sums = [(losses(w.head, o.x_BTD, o.target, policy) * o.weight).sum() for o in outputs]
            metrics["mtp_loss"] = sum(sums) / total / cfg.mtp_layers
        extra = optim.aux_loss * aux.aux_loss / train.accumulate
        extra += optim.mtp_loss * metrics.get("mtp_loss", 0.0)
        return loss + extra, aux._replace(metrics=metrics)

    return objective
