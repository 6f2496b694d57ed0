"""A model of a million parameters with byte tokens, for reinforcement learning on two CPU cores."""

from k2jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig


def toy() -> RunConfig:
    """1.04M parameters, byte tokens; supervised first, so that RL has something to reward.

        python -m k2jax.post.toy_tasks sum2 toy
        k2jax train toy --data.path toy/sum2.jsonl --out runs/sum2

    A minute on two cores leaves it with about half of the held-out sums right.
    """
    return RunConfig(
        name="toy",
        model=ModelConfig(
            vocab=512,
            embed=128,
            dense_layers=1,
            moe_layers=3,
            heads=4,
            q_rank=64,
            kv_rank=32,
            nope=16,
            rope=16,
            value=16,
            ffw=256,
            experts=8,
            expert_ffw=64,
            experts_per_token=2,
            context=64,
        ),
        data=DataConfig(rows=64, context=48),
        optim=OptimConfig(learning_rate=2e-3, warmup=10, decay=0.0, ns_dtype="float32"),
        train=TrainConfig(steps=185, dtype="float32", remat="none", eval_every=0, save_every=1_000),
    )


def toy_rl() -> RunConfig:
    """The same model, by rewards alone: 32 prompts with 8 samples each a step.

        k2jax rl toy_rl --init runs/sum2 --env sum2 --out runs/sum2-rl

    The rate falls to a tenth: Muon's steps have one size whatever the gradient's.
    """
    sft = toy()
    return RunConfig(
        name="toy_rl",
        model=sft.model,
        data=DataConfig(rows=256, context=16),
        optim=OptimConfig(
            learning_rate=3e-4, warmup=0, decay=1.0, bias_rate=0.0, ns_dtype="float32"
        ),
        train=TrainConfig(
            steps=500, dtype="float32", remat="none", eval_every=50, save_every=100, log_every=25
        ),
    )
