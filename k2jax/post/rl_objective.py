"""What a step of reinforcement learning minimises, and its batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax import sharding
from k2jax.config import ModelConfig, RunConfig
from k2jax.model import Aux, Batch, Choices, Dispatch, Kimi, Policy, hidden, losses
from k2jax.params.arrays import Params, bind
from k2jax.post.losses import Answers, grpo_loss, log_ratios, squared_loss, token_clip_loss
from k2jax.post.rl_config import RlConfig

BY_TOKEN = ("token", "target", "segment", "position", "weight", "old", "sampled", "expert")
INTEGERS = ("token", "target", "segment", "position")


class RlBatch(NamedTuple):
    """Rows of a step: samples, one a row, and curated data for PTX.

    The first six are those of `k2jax.model.Batch`, [.., rows, length]; a sample's `weight` is 1
    where the token to predict is the model's own.

    Attributes:
        old: float32 [.., rows, length], log-probability of the target under the policy that
            sampled, at the temperature of the sample; not read in a fresh row.
        sampled: the same, as the sampler computed it, at temperature 1.
        expert: int16 [.., rows, length, layers, experts a token], that the sampler chose; -1:
            unknown.
        fresh: float32 [.., rows], 1: the weights are still those that sampled, so this forward
            pass gives `old` too, and ratios are exactly 1.
        temperature: float32 [.., rows], of the sample.
        advantage: float32 [.., rows]; see `losses.Answers`.
        share: float32 [.., rows]; 0 for rows of curated data.
        curated: float32 [.., rows], share of each of a row's targets in the mean PTX loss.
    """

    token: jax.Array
    target: jax.Array
    weight: jax.Array
    segment: jax.Array
    position: jax.Array
    total: jax.Array | None
    old: jax.Array
    sampled: jax.Array
    expert: jax.Array
    fresh: jax.Array
    temperature: jax.Array
    advantage: jax.Array
    share: jax.Array
    curated: jax.Array


def empty_rows(rows: int, length: int, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Return rows that teach nothing: the fields of `RlBatch` but `total`."""
    fields = {}
    for name in RlBatch._fields:
        if name != "total":
            shape = (rows, length) if name in BY_TOKEN else (rows,)
            fields[name] = np.zeros(shape, np.int32 if name in INTEGERS else np.float32)
    fields["temperature"][:] = 1.0
    choices = (rows, length, cfg.moe_layers, cfg.experts_per_token)
    fields["expert"] = np.full(choices, -1, np.int16)
    return fields


def put_rows(rows: dict[str, np.ndarray], accumulate: int) -> RlBatch:
    """Cut rows, which every process has all of, into micro-batches on the mesh in use."""

    def put(name: str) -> jax.Array:
        array = rows[name].reshape(accumulate, -1, *rows[name].shape[1:])
        if sharding.meshless():
            return jnp.asarray(array)
        return jax.make_array_from_callback(array.shape, _layout(name), array.__getitem__)

    return RlBatch(total=None, **{name: put(name) for name in RlBatch._fields if name != "total"})


def abstract_rows(rows: int, length: int, accumulate: int, cfg: ModelConfig) -> RlBatch:
    """Describe what `put_rows` returns."""

    def describe(name: str, array: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (accumulate, rows // accumulate, *array.shape[1:])
        layout = None if sharding.meshless() else _layout(name)
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=layout)

    fields = {name: describe(name, a) for name, a in empty_rows(rows, length, cfg).items()}
    return RlBatch(**fields, total=None)  # type: ignore[arg-type]


def _layout(name: str) -> jax.NamedSharding:
    axes = ("batch", "length") if name in BY_TOKEN else ("batch",)
    spec = jax.P(None, *sharding.storage_spec(axes))
    return jax.NamedSharding(jax.sharding.get_mesh(), spec)


def make_objective(run: RunConfig, rl: RlConfig) -> Callable[..., tuple[jax.Array, Aux]]:
    """Make the objective: `rl.loss` on samples, plus `rl.ptx` times the loss on curated data.

    Its metrics are `loss`, the policy's alone; `sampler_max`, the largest difference between the
    log-probabilities of a token by the sampler and by this pass, and `sampler_mean`; `log_ratio`,
    the mean of |log(pi / pi_old)| by token; `experts_differ`, the share of the sampler's choices
    of experts that are not used here; with PTX `ptx_loss`, in nats per token.
    """

    def objective(params: Params, batch: RlBatch) -> tuple[jax.Array, Aux]:
        (plain_BT, logprob_BT), aux = read_rows(params, batch, run, rl, run.train.remat)
        mask_BT = batch.weight * (batch.curated == 0)[:, None]
        fresh_B1 = batch.fresh[:, None] > 0
        old_BT = jnp.where(fresh_B1, jax.lax.stop_gradient(logprob_BT), batch.old)
        answers = Answers(old_BT, mask_BT, batch.advantage, batch.share)
        loss = _policy_loss(logprob_BT, answers, rl)
        away_BT = jnp.abs(jax.lax.stop_gradient(plain_BT) - batch.sampled) * mask_BT * fresh_B1
        own = jnp.maximum(mask_BT.sum(), 1.0) * run.train.accumulate
        metrics = {
            "loss": loss,
            "sampler_max": away_BT.max(),
            "sampler_mean": away_BT.sum() / own,
            "log_ratio": jnp.abs(log_ratios(logprob_BT, answers)).sum() / own,
            "experts_differ": aux.metrics["experts_differ"] / run.train.accumulate,
        }
        extra = run.optim.aux_loss * aux.aux_loss / run.train.accumulate
        if rl.ptx:
            share_BT = batch.weight * batch.curated[:, None]
            metrics["ptx_loss"] = -(plain_BT * share_BT).sum()
            extra += rl.ptx * metrics["ptx_loss"]
        return loss + extra, aux._replace(metrics=metrics)

    return objective


def is_tempered(rl: RlConfig) -> bool:
    """Whether any sample is drawn at another temperature than 1."""
    return (rl.temperature, rl.final_temperature) != (1.0, 1.0)


def read_rows(
    params: Params, batch: RlBatch, run: RunConfig, rl: RlConfig, remat: str
) -> tuple[tuple[jax.Array, jax.Array], Aux]:
    """Pass one micro-batch through the network.

    Returns:
        The targets' log-probabilities at temperature 1, and at that of each row; statistics.
    """
    dispatch = Dispatch(run.train.dispatch, run.train.buffer)
    policy = Policy(run.train.dtype, run.train.grad_dtype, remat, dispatch)
    w = bind(Kimi(run.model), params)
    rows = Batch(batch.token, batch.target, batch.weight, batch.segment, batch.position)
    choices = Choices(batch.expert, rl.replay_routing)
    x_BTD, aux = hidden(w, rows, run.model, policy, choices)
    plain_BT = -losses(w.head, x_BTD, batch.target, policy)
    if not is_tempered(rl):
        return (plain_BT, plain_BT), aux
    cooled_BTD = x_BTD / batch.temperature[:, None, None].astype(x_BTD.dtype)
    return (plain_BT, -losses(w.head, cooled_BTD, batch.target, policy)), aux


def _policy_loss(logprob_BT: jax.Array, answers: Answers, rl: RlConfig) -> jax.Array:
    if rl.loss == "grpo":
        return grpo_loss(logprob_BT, answers, (rl.clip_low, rl.clip_high))
    if rl.loss == "token_clip":
        return token_clip_loss(logprob_BT, answers, rl.tau, (-rl.band, rl.band))
    return squared_loss(logprob_BT, answers, rl.tau)
