"""Losses of reinforcement learning, as pure functions of log-probabilities, rewards and masks.

Letters: B samples, T tokens of a row, G groups (one prompt each), K samples of a group.

A loss gets `logprob_BT`, of each token under the weights that learn, and `Answers`. Shares are made
from the whole batch, so the losses of its micro-batches add up to the batch's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STD_EPS = 1e-4  # as TRL; a group whose rewards hardly differ does not explode


class Weighing(NamedTuple):
    """What a loss needs to know of rewards; both float64 [groups, samples of a group]."""

    advantage_GK: np.ndarray
    share_GK: np.ndarray  # sums to 1 over samples, or over tokens with `token_clip`


class Answers(NamedTuple):
    """What was sampled.

    Attributes:
        old_BT: log-probability of each token under the policy that sampled it.
        mask_BT: 1 where the token is the model's own, else 0.
        advantage_B: what a sample's reward is above its group's; from `weigh_samples`, as the next.
        share_B: a sample's share of the mean.
    """

    old_BT: jax.Array
    mask_BT: jax.Array
    advantage_B: jax.Array
    share_B: jax.Array


def weigh_samples(
    reward_GK: np.ndarray,
    counts_GK: np.ndarray,
    length_GK: np.ndarray,
    loss: str,
    baseline: str = "mean",
    tau: float = 0.1,
) -> Weighing:
    """Compare rewards within their groups.

    A group whose rewards are all alike teaches nothing, and is left out of the mean over samples;
    so is one with fewer than two samples that count.

    Args:
        reward_GK: of every sample; not read where it does not count.
        counts_GK: bool; False: the sample failed for a reason of ours, such as a broken reward.
        length_GK: tokens of the model's own in each sample.
        loss: "squared", "grpo" or "token_clip". `grpo` divides by the group's deviation, as TRL
            (of a sample, plus 1e-4).
        baseline: for `squared`: the mean reward, or tau log mean exp(r / tau), which it
            approximates [K15].
        tau: see `squared_loss`.
    """
    counts_GK = np.asarray(counts_GK, bool)
    reward_GK = np.where(counts_GK, reward_GK, 0.0).astype(np.float64)
    number_G1 = counts_GK.sum(axis=1, keepdims=True)
    mean_G1 = reward_GK.sum(axis=1, keepdims=True) / np.maximum(number_G1, 1)
    advantage_GK = np.where(counts_GK, reward_GK - mean_G1, 0.0)
    low_G1 = np.where(counts_GK, reward_GK, np.inf).min(axis=1, keepdims=True)
    high_G1 = np.where(counts_GK, reward_GK, -np.inf).max(axis=1, keepdims=True)
    kept_GK = counts_GK & (high_G1 > low_G1)
    if loss == "grpo":
        squares_G1 = (advantage_GK**2).sum(axis=1, keepdims=True)
        std_G1 = np.sqrt(squares_G1 / np.maximum(number_G1 - 1, 1))
        advantage_GK = advantage_GK / (std_G1 + STD_EPS)
    elif loss == "squared" and baseline == "log_mean_exp":
        top_G1 = np.where(number_G1 > 0, high_G1, 0.0)
        tilt_GK = np.where(counts_GK, np.exp((reward_GK - top_G1) / tau), 0.0)
        mean_G1 = tilt_GK.sum(axis=1, keepdims=True) / np.maximum(number_G1, 1)
        base_G1 = top_G1 + tau * np.log(np.where(mean_G1 > 0, mean_G1, 1.0))
        advantage_GK = np.where(counts_GK, reward_GK - base_G1, 0.0)
    total = np.where(kept_GK, length_GK, 0).sum() if loss == "token_clip" else kept_GK.sum()
    return Weighing(np.where(kept_GK, advantage_GK, 0.0), kept_GK / max(total, 1))


def log_ratios(logprob_BT: jax.Array, answers: Answers) -> jax.Array:
    """Return log(pi / pi_old) of each token, 0 where it is not the model's own."""
    return jnp.where(answers.mask_BT > 0, logprob_BT - answers.old_BT, 0.0)


def squared_loss(
    logprob_BT: jax.Array,
    answers: Answers,
    tau: float,
) -> jax.Array:
    """Compute K1.5's and K2's loss: the mean of (r - mean r - tau log(pi / pi_old))**2.

    The ratio is of whole answers: the sum over their tokens, not divided by the length. At its
    stationary point s = log(pi / pi_old) of every answer fulfils A - tau s = lambda e**s; with the
    log-mean-exp baseline pi is the tilt of pi_old by e**(r / tau).

    Args:
        logprob_BT: differentiated by.
        answers: what was sampled.
        tau: how much the policy is held back; above 0.

    Source: [K2-TR 3.2.2; K15 2.3.2].
    """
    ratio_B = log_ratios(logprob_BT, answers).sum(axis=-1)
    return (answers.share_B * (answers.advantage_B - tau * ratio_B) ** 2).sum()


def grpo_loss(
    logprob_BT: jax.Array,
    answers: Answers,
    clip: tuple[float, float] = (0.2, 0.2),
    kl: float = 0.0,
    ref_BT: jax.Array | None = None,
) -> jax.Array:
    """Compute GRPO's loss, to compare with: clipped ratios by token, averaged over each answer.

    Args:
        logprob_BT: differentiated by.
        answers: what was sampled.
        clip: how far a ratio may leave 1, downwards and upwards.
        kl: weight of the divergence from the reference, pi_ref / pi - log(pi_ref / pi) - 1.
        ref_BT: log-probabilities under the reference; only read with `kl`.

    Source: [DSV3-TR 5.2.2], by token as in TRL (`loss_type="grpo"`).
    """
    ratio_BT = jnp.exp(log_ratios(logprob_BT, answers))
    clipped_BT = jnp.clip(ratio_BT, 1 - clip[0], 1 + clip[1])
    advantage_B1 = answers.advantage_B[:, None]
    loss_BT = -jnp.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
    if kl:
        assert ref_BT is not None
        ref_ratio_BT = -log_ratios(logprob_BT, answers._replace(old_BT=ref_BT))
        loss_BT += kl * (jnp.exp(ref_ratio_BT) - ref_ratio_BT - 1)
    mask_BT = (answers.mask_BT > 0).astype(loss_BT.dtype)
    mean_B = (loss_BT * mask_BT).sum(axis=-1) / jnp.maximum(mask_BT.sum(axis=-1), 1)
    return (answers.share_B * mean_B).sum()


def token_clip_loss(
    logprob_BT: jax.Array,
    answers: Answers,
    tau: float,
    band: tuple[float, float],
) -> jax.Array:
    """Compute K2.5's loss: the mean over tokens of tau log(pi / pi_old)**2 - A pi / pi_old.

    Where a token's log-ratio leaves the band, whichever the sign of its advantage, the second term
    has no gradient; the first still pulls it back.

    Args:
        logprob_BT: differentiated by.
        answers: their shares are one divided by the batch's tokens.
        tau: how much the policy is held back.
        band: least and largest log-ratio.

    Source: K2.5's report as others describe it; its constants are not known to us.
    """
    ratio_BT = log_ratios(logprob_BT, answers)
    gain_BT = jnp.exp(jnp.clip(ratio_BT, *band)) * answers.advantage_B[:, None]
    loss_BT = jnp.where(answers.mask_BT > 0, tau * ratio_BT**2 - gain_BT, 0.0)
    return (answers.share_B[:, None] * loss_BT).sum()
