"""K2's stages are what its report says [K2-TR 2.4; spec 3.1]."""

import pytest

from k2jax import configs
from k2jax.config import validate
from k2jax.model import Kimi
from k2jax.optim.schedule import warmup_stable_decay
from k2jax.params.declare import specs

BATCH = 2**26
STAGES = {  # tokens, context, first and last rate
    "kimi_k2_pretrain": (15.5e12, 4_096, 2e-4, 2e-5),
    "kimi_k2_anneal": (400e9, 4_096, 2e-5, 7e-6),
    "kimi_k2_32k": (60e9, 32_768, 7e-6, 7e-6),
    "kimi_k2_128k": (100 * BATCH, 131_072, 7e-6, 7e-6),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_its_tokens_batch_and_rates(name):
    tokens, context, first, last = STAGES[name]
    run = configs.load(name)
    validate(run)
    assert run.data.rows * run.data.context == BATCH and run.data.context == context
    assert abs(run.train.steps * BATCH - tokens) <= BATCH / 2
    rate = warmup_stable_decay(
        run.optim.learning_rate,
        run.train.steps,
        warmup=run.optim.warmup,
        decay=run.optim.decay,
        final=run.optim.final_rate,
    )
    # float32 of the rate, and a cosine that has only begun to fall in its first step.
    assert float(rate(max(run.optim.warmup - 1, 0))) == pytest.approx(first, rel=1e-6)
    assert float(rate(run.train.steps - 1)) == pytest.approx(last, rel=1e-6)


def test_pretraining_falls_after_ten_trillion_tokens():
    run = configs.load("kimi_k2_pretrain")
    assert run.train.steps * BATCH * (1 - run.optim.decay) == pytest.approx(10e12, rel=1e-6)


def test_a_stage_begins_with_the_weights_of_the_one_before():
    wanted = {name: leaf.shape for name, leaf in specs(Kimi(configs.load("kimi_k2").model)).items()}
    for name in STAGES:
        found = specs(Kimi(configs.load(name).model))
        assert {name: leaf.shape for name, leaf in found.items()} == wanted


def test_yarn_comes_last():
    factors = [configs.load(name).model.yarn.factor for name in STAGES]
    assert factors == [1.0, 1.0, 1.0, 32.0]
    assert configs.load("kimi_k2_128k").model == configs.load("kimi_k2").model
