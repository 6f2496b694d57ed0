"""Moonlight, the 16B model that Muon was scaled on [ML]."""

from k2jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)


def moonlight_16b_a3b() -> RunConfig:
    """16.0B parameters, 8k context, no query rank, no YaRN.

    `k2jax describe moonlight_16b_a3b` lists it. Laid out for 64 chips; not run by us.
    """
    return RunConfig(
        name="moonlight_16b_a3b",
        model=ModelConfig(
            embed=2_048,
            dense_layers=1,
            moe_layers=26,
            heads=16,
            q_rank=0,
            ffw=11_264,
            experts=64,
            expert_ffw=1_408,
            experts_per_token=6,
            shared_experts=2,
            routed_scale=2.446,
            norm_eps=1e-5,
            context=8_192,
        ),
        data=DataConfig(rows=2_048, context=8_192),
        optim=OptimConfig(learning_rate=4.2e-4, warmup=2_000),
        train=TrainConfig(
            steps=340_000,
            accumulate=8,
            dispatch="alltoall",
            loads_every=100,
        ),
        mesh=MeshConfig(data=4, expert=16),
    )
