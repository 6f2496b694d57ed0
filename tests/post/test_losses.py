"""The losses of reinforcement learning against closed forms, finite differences and TRL."""

import functools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.special import lambertw, logsumexp

from k2jax.post.losses import Answers, grpo_loss, squared_loss, token_clip_loss, weigh_samples

TAU = 0.3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def table(answers, seed):
    draw = np.random.default_rng(seed)
    old = draw.normal(size=answers)
    return old - logsumexp(old), draw.uniform(size=answers)


def minimise(old, reward, advantage):
    """The logs of the policy at the loss's least, over a table of answers of one token each."""

    def loss(logits):
        logprob = jax.nn.log_softmax(logits)
        answers = Answers(old[:, None], jnp.ones((len(old), 1)), advantage, jnp.exp(old))
        return squared_loss(logprob[:, None], answers, TAU)

    value = jax.jit(jax.value_and_grad(loss))
    start = np.asarray(old)
    result = minimize(lambda x: [np.asarray(a) for a in value(x)], start, jac=True, tol=1e-12)
    return np.asarray(jax.nn.log_softmax(result.x))


@pytest.mark.parametrize("answers", [5, 9, 20])
def test_stationary_point_is_the_lambert_w_form(answers):
    old, reward = table(answers, answers)
    advantage = reward - (np.exp(old) * reward).sum()

    def shift(lam):  # s of every answer: A - tau s = lam e^s
        if lam == 0:
            return advantage / TAU
        return advantage / TAU - lambertw(lam / TAU * np.exp(advantage / TAU)).real

    lam = brentq(lambda x: logsumexp(old + shift(x)), 0, 50, xtol=1e-14)
    expected = shift(lam)
    s = minimise(old, reward, advantage) - old
    assert np.abs(s - expected).max() <= 1e-4
    assert np.abs(advantage - TAU * s - lam * np.exp(s)).max() <= 1e-4


@pytest.mark.parametrize("answers", [5, 20])
def test_with_the_log_mean_exp_baseline_the_policy_is_the_tilt(answers):
    old, reward = table(answers, answers)
    base = TAU * logsumexp(old + reward / TAU)
    tilted = old + reward / TAU
    new = minimise(old, reward, reward - base)
    assert np.abs(new - (tilted - logsumexp(tilted))).max() <= 1e-4


def rows(seed=0, samples=6, length=5):
    draw = np.random.default_rng(seed)
    new, old, ref = (-draw.uniform(0.1, 3.0, (samples, length)) for _ in range(3))
    old = new + draw.normal(scale=0.3, size=new.shape)
    mask = (np.arange(length) < draw.integers(1, length + 1, (samples, 1))).astype(float)
    advantage = draw.normal(size=samples)
    share = np.full(samples, 1 / samples)
    return new, old, ref, mask, advantage, share


LOSSES = {
    "squared": functools.partial(squared_loss, tau=TAU),
    "grpo": grpo_loss,
    "token_clip": functools.partial(token_clip_loss, tau=TAU, band=(-0.2, 0.25)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    new, old, _, mask, advantage, share = rows()
    loss = jax.jit(lambda x: LOSSES[name](x, Answers(old, mask, advantage, share)))
    grad = jax.grad(loss)(jnp.asarray(new))
    step = 1e-6
    for at in np.ndindex(new.shape):
        moved = np.zeros_like(new)
        moved[at] = step
        slope = (loss(new + moved) - loss(new - moved)) / (2 * step)
        assert abs(slope - grad[at]) <= 1e-6


def test_on_policy_the_squared_loss_has_the_policy_gradient():
    new, _, _, mask, advantage, share = rows()
    answers = Answers(new, mask, advantage, share)
    grad = jax.grad(lambda x: squared_loss(x, answers, TAU))(jnp.asarray(new))
    np.testing.assert_allclose(grad, -2 * TAU * (share * advantage)[:, None] * mask, atol=1e-15)


def test_padding_has_no_part_even_where_it_is_not_finite():
    new, old, _, mask, advantage, share = rows()
    for loss in LOSSES.values():
        value = loss(new, Answers(old, mask, advantage, share))
        poisoned = np.where(mask > 0, old, np.nan)
        assert loss(new, Answers(poisoned, mask, advantage, share)) == value


def grpo_by_hand(new, old, ref, mask, advantage, clip, kl):
    total = 0.0
    for i in range(len(new)):
        tokens = []
        for t in range(new.shape[1]):
            if mask[i, t]:
                ratio = np.exp(new[i, t] - old[i, t])
                limited = min(max(ratio, 1 - clip[0]), 1 + clip[1])
                to_ref = ref[i, t] - new[i, t]
                gain = min(ratio * advantage[i], limited * advantage[i])
                tokens.append(-gain + kl * (np.exp(to_ref) - to_ref - 1))
        total += np.mean(tokens)
    return total / len(new)


@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_grpo_is_the_formula_written_out(kl):
    new, old, ref, mask, advantage, share = rows()
    value = grpo_loss(new, Answers(old, mask, advantage, share), (0.2, 0.28), kl, ref)
    assert abs(value - grpo_by_hand(new, old, ref, mask, advantage, (0.2, 0.28), kl)) <= 1e-12


@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_grpo_is_trls(kl):
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")
    from trl import GRPOTrainer

    new, old, ref, mask, advantage, share = rows()
    trainer = mock.MagicMock()
    for name, value in {
        "beta": kl,
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "top_entropy_quantile": 1.0,
        "importance_sampling_level": "token",
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False),
    }.items():
        setattr(trainer, name, value)
    tensors = {k: torch.tensor(v) for k, v in (("new", new), ("old", old), ("ref", ref))}
    logprobs = (tensors["new"], torch.zeros_like(tensors["new"]), None)
    trainer._get_per_token_logps_and_entropies.return_value = logprobs
    trainer.accelerator.gather.side_effect = lambda a: a
    ids = torch.ones(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": torch.tensor(mask),
        "advantages": torch.tensor(advantage),
        "old_per_token_logps": tensors["old"],
        "ref_per_token_logps": tensors["ref"],
    }
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs).item()
    assert (
        abs(theirs - grpo_loss(new, Answers(old, mask, advantage, share), (0.2, 0.28), kl, ref))
        <= 1e-5
    )


def test_groups_with_one_reward_and_failed_samples_are_left_out_of_means():
    reward = np.array([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 1, np.nan, 0]])
    counts = np.isfinite(reward)
    lengths = np.full(reward.shape, 3)
    weighing = weigh_samples(reward, counts, lengths, "squared")
    kept = np.array([[1.0] * 4, [0.0] * 4, [1, 1, 0, 1]])
    np.testing.assert_allclose(weighing.share_GK, kept / 7)
    np.testing.assert_allclose(weighing.advantage_GK[0], [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(weighing.advantage_GK[2], [-1 / 3, 2 / 3, 0, -1 / 3])
    by_token = weigh_samples(reward, counts, lengths, "token_clip")
    np.testing.assert_allclose(by_token.share_GK, kept / 21)


def test_log_mean_exp_baseline_is_of_those_that_count():
    reward = np.array([[1.0, 0.0, 0.5, 9.0]])
    counts = np.array([[True, True, True, False]])
    weighing = weigh_samples(reward, counts, np.ones((1, 4)), "squared", "log_mean_exp", TAU)
    base = TAU * (logsumexp(reward[0, :3] / TAU) - np.log(3))
    np.testing.assert_allclose(weighing.advantage_GK[0], [*(reward[0, :3] - base), 0])


def test_grpo_advantages_have_the_groups_deviation():
    reward = np.array([[1.0, 0.0, 0.0, 0.5]])
    weighing = weigh_samples(reward, reward >= 0, np.ones((1, 4)), "grpo")
    expected = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(weighing.advantage_GK, expected)


def test_nothing_to_learn_gives_no_share():
    weighing = weigh_samples(np.zeros((2, 3)), np.zeros((2, 3)), np.ones((2, 3)), "squared")
    assert not weighing.share_GK.any() and not weighing.advantage_GK.any()
