"""Kimi K2 and its releases [K2-TR table 2]. One architecture; rotary settings differ.

K2's training in stages [K2-TR 2.4; spec 3.1], each from the weights of the one before, all with
batches of 2**26 tokens on 1,024 chips:

    k2jax train kimi_k2_pretrain
    k2jax train kimi_k2_anneal --init runs/kimi_k2_pretrain
    k2jax train kimi_k2_32k --init runs/kimi_k2_anneal
    k2jax train kimi_k2_128k --init runs/kimi_k2_32k

We have not run any of them. `k2jax plan CONFIG --target v5p:8x8x16` finds meshes that fit for
all four, 32k and 128k included.
"""

import dataclasses

from k2jax.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    Yarn,
)


def kimi_k2() -> RunConfig:
    """K2-Base and K2-Instruct: 1.03T parameters, pre-training at 4,096 tokens.

    `k2jax describe kimi_k2` lists it. Training is laid out for 1,024 chips; not run by us.
    """
    return RunConfig(
        name="kimi_k2",
        model=ModelConfig(yarn=Yarn(factor=32.0)),
        data=DataConfig(rows=16_384),
        optim=OptimConfig(),
        train=TrainConfig(
            steps=231_000,
            accumulate=16,
            dispatch="alltoall",
            loads_every=100,  # all of them in every step: 210 kB a line, 49 GB a run
        ),
        mesh=MeshConfig(data=8, expert=128),
    )


def kimi_k2_pretrain() -> RunConfig:
    """15.5T tokens at 4,096 without YaRN: 2e-4 for 10T of them, then a cosine down to 2e-5."""
    optim = OptimConfig(decay=5.5 / 15.5)
    return _stage("kimi_k2_pretrain", steps=230_968, context=4_096, optim=optim)


def kimi_k2_anneal() -> RunConfig:
    """400B tokens at 4,096, from 2e-5 down to 7e-6.

    The shape of the descent is not published, nor whether it ends here or at 32k: ours.
    """
    optim = OptimConfig(learning_rate=2e-5, final_rate=0.35, warmup=0, decay=1.0)
    return _stage("kimi_k2_anneal", steps=5_960, context=4_096, optim=optim)


def kimi_k2_32k() -> RunConfig:
    """60B tokens at 32,768 and 7e-6, rotations as before. That they are is not published: ours."""
    optim = OptimConfig(learning_rate=7e-6, final_rate=1.0, warmup=0, decay=0.0)
    mesh = MeshConfig(expert=64, context=16)
    return _stage("kimi_k2_32k", steps=894, context=32_768, optim=optim, mesh=mesh)


def kimi_k2_128k() -> RunConfig:
    """YaRN to 131,072, the released model, and 100 steps there at 7e-6.

    The report has YaRN only and no token at this length: the steps are ours.
    """
    optim = OptimConfig(learning_rate=7e-6, final_rate=1.0, warmup=0, decay=0.0)
    mesh = MeshConfig(expert=64, context=16)
    run = _stage("kimi_k2_128k", steps=100, every=10, context=131_072, optim=optim, mesh=mesh)
    return dataclasses.replace(run, model=kimi_k2().model)


def kimi_k2_0905() -> RunConfig:
    """K2-Instruct-0905: the context doubled, YaRN factor 64. `k2jax describe kimi_k2_0905`."""
    return _release("kimi_k2_0905", yarn=Yarn(factor=64.0), context=262_144)


def kimi_k2_thinking() -> RunConfig:
    """K2-Thinking: as 0905 with epsilon 1e-5. `k2jax describe kimi_k2_thinking`."""
    return _release("kimi_k2_thinking", yarn=Yarn(factor=64.0), context=262_144, norm_eps=1e-5)


def kimi_k2_5() -> RunConfig:
    """The text part of K2.5 and K2.6: YaRN with a linear ramp. `k2jax describe kimi_k2_5`."""
    return _release(
        "kimi_k2_5", yarn=Yarn(factor=64.0, beta_fast=32.0), context=262_144, norm_eps=1e-5
    )


def _release(name: str, **changes) -> RunConfig:
    run = kimi_k2()
    return dataclasses.replace(run, name=name, model=dataclasses.replace(run.model, **changes))


def _stage(
    name: str,
    *,
    steps: int,
    context: int,
    optim: OptimConfig,
    mesh: MeshConfig | None = None,
    every: int = 100,
) -> RunConfig:
    """The same tokens a step, one row a group of devices in each micro-batch.

    A save and a score every `every` steps: 100 of them take hours, even on 1,024 chips.
    """
    run = kimi_k2()
    mesh = mesh or run.mesh
    rows = run.data.rows * run.data.context // context
    return dataclasses.replace(
        run,
        name=name,
        model=ModelConfig(),
        data=DataConfig(rows=rows, context=context),
        optim=optim,
        train=dataclasses.replace(
            run.train,
            steps=steps,
            accumulate=rows // (mesh.data * mesh.expert),
            eval_every=every,
            save_every=every,
        ),
        mesh=mesh,
    )
