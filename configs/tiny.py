"""The same architecture at sizes that a laptop trains."""

from k2jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig


def tiny() -> RunConfig:
    """26M parameters, 8M of them active with the head; `make train`, 2 CPU cores.

    Two devices that the CPU emulates have half of the batch and of the experts each, and keep a
    core busy each. What is learned in so few steps is which tokens follow which, and longer tokens
    say more: the vocabulary is a third of the model. `docs/training.md` has what was tried.
    """
    return RunConfig(
        name="tiny",
        model=ModelConfig(
            vocab=16_384,
            embed=256,
            dense_layers=1,
            moe_layers=5,
            heads=8,
            q_rank=96,
            kv_rank=64,
            nope=32,
            rope=16,
            value=32,
            ffw=704,
            experts=32,
            expert_ffw=128,
            experts_per_token=4,
            context=256,
        ),
        data=DataConfig(rows=8, context=256),
        optim=OptimConfig(
            learning_rate=5e-3,
            adam_scale=4.0,
            momentum=0.9,  # forgets sooner than K2's 0.95, in a run this short
            warmup=10,
            decay=0.5,
            bias_rate=2e-2,
            ns_dtype="float32",  # CPUs multiply bfloat16 slower
        ),
        train=TrainConfig(
            steps=150, dtype="float32", remat="none", eval_every=25, eval_rows=16, save_every=50
        ),
        mesh=MeshConfig(expert=2),
    )


def small() -> RunConfig:
    """86M parameters, meant for an evening on 2 CPU cores or a GPU; not run by us yet.

    `k2jax train small`; on one GPU add `--mesh.expert 1 --train.dtype bfloat16`.
    """
    return RunConfig(
        name="small",
        model=ModelConfig(
            vocab=8_192,
            embed=384,
            dense_layers=1,
            moe_layers=7,
            heads=8,
            q_rank=192,
            kv_rank=128,
            nope=48,
            rope=24,
            value=48,
            ffw=1_056,
            experts=48,
            expert_ffw=192,
            experts_per_token=4,
            context=512,
        ),
        data=DataConfig(rows=32, context=512),
        optim=OptimConfig(learning_rate=1e-2, warmup=50, decay=0.5, ns_dtype="float32"),
        train=TrainConfig(steps=1_000, dtype="float32", remat="none", eval_every=100, eval_rows=32),
        mesh=MeshConfig(expert=2),
    )
