"""Tasks and rewards of a step, and the rows that its rollouts become."""

from collections.abc import Sequence

import numpy as np

from k2jax import cluster
from k2jax.config import ConfigError, RunConfig
from k2jax.data.batches import shuffle
from k2jax.post.environment import Environment
from k2jax.post.losses import weigh_samples
from k2jax.post.rl_config import RlConfig
from k2jax.post.rl_objective import empty_rows
from k2jax.post.rollouts import SOLVED, Rollout, Sampler, Try, summarise


class Tasks:
    """Which tasks a step tries: all in turn, in an order shuffled anew in every epoch."""

    def __init__(self, env: Environment, run: RunConfig, rl: RlConfig):
        """Plan them; they depend on `data.seed` and the step alone.

        Raises:
            ConfigError: the environment has no tasks to learn from.
        """
        if not env.count("train"):
            raise ConfigError(f"environment {env.name} has no tasks in its split 'train'")
        self.count, self.seed, self.group = env.count("train"), run.data.seed, rl.group
        self.prompts = run.data.rows // rl.group

    def of_step(self, step: int) -> list[Try]:
        """Return a step's (0, 1, ...) samples, one prompt's beside each other."""
        index = step * self.prompts + np.arange(self.prompts, dtype=np.int64)
        tries = []
        for i in index:
            epoch, place = divmod(int(i), self.count)
            number = int(shuffle(np.array([place]), self.count, self.seed, epoch)[0])
            tries += [Try(number, make_seed(self.seed, step, int(i), k)) for k in range(self.group)]
        return tries


def make_seed(*numbers: int) -> int:
    """Return a seed that these numbers decide."""
    return int(np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1)[0])


def find_temperature(rl: RlConfig, step: int, steps: int) -> float:
    """Return the temperature of the samples of a step (0, 1, ...); it changes evenly."""
    share = step / max(steps - 1, 1)
    return float(rl.temperature + (rl.final_temperature - rl.temperature) * share)


def compute_rewards(rollouts: Sequence[Rollout], rl: RlConfig, step: int, seed: int) -> np.ndarray:
    """Return what each sample gets, [groups, samples]; NaN: it failed and does not count.

    A truncated sample gets minus `rl.truncation_penalty`, whatever it might have said. With
    `rl.toggle`, in every second phase, a right sample that is longer than that share of its group's
    right ones gets nothing, where the group's mean is high enough [K2.5, as others describe it;
    that the length is taken from the group is ours].
    """
    reward = np.array(
        [
            np.nan if r.failure else -rl.truncation_penalty if r.is_truncated else r.reward
            for r in rollouts
        ]
    )
    if rl.control == "shuffled_rewards":
        reward = np.random.default_rng([seed, step]).permutation(reward)
    reward_GK = reward.reshape(-1, rl.group)
    if not rl.toggle or step // rl.toggle % 2:
        return reward_GK
    length_GK = np.array([r.own_count for r in rollouts]).reshape(reward_GK.shape)
    for rewards, lengths in zip(reward_GK, length_GK, strict=True):
        solved = rewards >= SOLVED
        if solved.any() and np.nanmean(rewards) >= rl.toggle_accuracy:
            longest = np.quantile(lengths[solved], rl.toggle_share)
            rewards[solved & (lengths > longest)] = 0.0
    return reward_GK


def lay_out(
    rollouts: Sequence[Rollout],
    reward_GK: np.ndarray,
    rl: RlConfig,
    run: RunConfig,
    temperature: float,
) -> dict[str, np.ndarray]:
    """Return the rows of a step, one sample a row; see `RlBatch`.

    Args:
        rollouts: group by group.
        reward_GK: from `compute_rewards`.
        rl: how they are weighed.
        run: sizes.
        temperature: that they were drawn at.
    """
    counts_GK = np.isfinite(reward_GK)
    own_GK = np.array([r.own_count for r in rollouts]).reshape(reward_GK.shape)
    weighing = weigh_samples(reward_GK, counts_GK, own_GK, rl.loss, rl.baseline, rl.tau)
    rows = empty_rows(len(rollouts), run.data.context, run.model)
    rows["fresh"][:], rows["temperature"][:] = 1.0, temperature
    rows["advantage"][:] = weighing.advantage_GK.ravel()
    rows["share"][:] = weighing.share_GK.ravel()
    for i, rollout in enumerate(rollouts):
        ids, own = np.array(rollout.ids), np.array(rollout.own)
        here = slice(len(ids) - 1)
        rows["token"][i, here], rows["target"][i, here] = ids[:-1], ids[1:]
        rows["segment"][i, here], rows["position"][i, here] = 1, np.arange(len(ids) - 1)
        rows["weight"][i, here] = own[1:]
        rows["sampled"][i, here][own[1:]] = rollout.logprobs
        if rollout.experts is not None:
            rows["expert"][i, here] = rollout.experts
    return rows


def add_curated(
    rows: dict[str, np.ndarray], curated: dict[str, np.ndarray], run: RunConfig
) -> dict[str, np.ndarray]:
    """Add rows of curated data to each micro-batch of samples."""
    count, length = curated["tokens"].shape
    extra = empty_rows(count, length, run.model)
    names = {"token": "tokens", "target": "targets", "weight": "weights", "segment": "segments"}
    for name, theirs in (names | {"position": "positions"}).items():
        extra[name][:] = curated[theirs]
    extra["curated"][:] = 1 / max(curated["weights"].sum(), 1.0)

    def join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        parts = [array.reshape(run.train.accumulate, -1, *array.shape[1:]) for array in (a, b)]
        return np.concatenate(parts, axis=1).reshape(-1, *a.shape[1:])

    return {name: join(array, extra[name]) for name, array in rows.items()}


def describe_rewards(rollouts: Sequence[Rollout], reward_GK: np.ndarray) -> dict[str, float]:
    """Return the metrics of a step's samples."""
    counts_GK = np.isfinite(reward_GK)
    high_G = np.where(counts_GK, reward_GK, -np.inf).max(axis=1)
    low_G = np.where(counts_GK, reward_GK, np.inf).min(axis=1)
    mean = float(reward_GK[counts_GK].mean()) if counts_GK.any() else np.nan
    metrics = summarise(rollouts) | {"reward": mean}
    metrics["groups_that_teach"] = float((high_G > low_G).mean())
    judged = [r for r in rollouts if not r.failure]
    names = sorted({name for r in judged for name in r.parts})
    for name in names if len(names) > 1 else ():
        metrics[f"reward_{name}"] = float(np.mean([r.parts.get(name, 0.0) for r in judged]))
    for name in sorted({name for r in judged for name in r.notes}):
        metrics[f"env_{name}"] = float(np.mean([r.notes[name] for r in judged if name in r.notes]))
    return metrics


def hold_scores(sampler: Sampler, rl: RlConfig, seed: int) -> dict[str, float]:
    """Try held-out tasks, the same ones every time: sampled at temperature 1, and greedily.

    Nothing is returned where there are none.
    """
    env = sampler.env
    count = min(rl.eval_prompts, env.count("heldout"))
    if not count:
        return {}
    numbers = shuffle(np.arange(count), env.count("heldout"), seed, 0)
    tries = [Try(int(n), make_seed(seed, int(n))) for n in numbers]

    def score() -> dict[str, float]:
        scores = {}
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            summary = summarise(sampler.sample("heldout", tries, temperature))
            scores[f"heldout_{name}"] = summary["accuracy"]
        return scores

    return cluster.current().tell("held-out scores", sampler.engine.lead(score))
