"""DeepSeek-V3, whose architecture K2 takes over [DSV3-TR]."""

from k2jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    Yarn,
)


def deepseek_v3() -> RunConfig:
    """671B parameters, and 12B of the MTP layer; choice of experts limited to 4 of 8 groups.

    `k2jax describe deepseek_v3` lists it. Laid out for 1,024 chips; not run by us.
    """
    return RunConfig(
        name="deepseek_v3",
        model=ModelConfig(
            vocab=129_280,
            dense_layers=3,
            moe_layers=58,
            mtp_layers=1,
            heads=128,
            experts=256,
            routed_scale=2.5,
            groups=8,
            groups_per_token=4,
            rope_theta=10_000.0,
            yarn=Yarn(factor=40.0, beta_fast=32.0),
            context=163_840,
        ),
        data=DataConfig(rows=15_360),
        optim=OptimConfig(
            name="adamw", learning_rate=2.2e-4, warmup=2_000, clip_norm=1.0, aux_loss=1e-4
        ),
        train=TrainConfig(
            steps=235_000,
            accumulate=15,
            dispatch="alltoall",
            loads_every=100,
        ),
        mesh=MeshConfig(data=16, expert=32, model=2),
    )
