"""Runs that several files of tests look at; each is made once."""

import shutil
from pathlib import Path

import pytest
from small_model import SIZES
from small_runs import own_caches, terminating

from k2jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from k2jax.training.loop import train


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> RunConfig:
    """Six steps on a folder of short texts; AdamW, because it compiles faster."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        words = (f"def f{number}_{i}(x): return x + {i * number}\n" for i in range(20))
        (folder / f"{number}.py").write_text("".join(words))
    return RunConfig(
        name="test",
        model=ModelConfig(**SIZES),
        data=DataConfig(path=str(folder), rows=8, context=32),
        optim=OptimConfig(name="adamw", learning_rate=1e-2, warmup=2),
        train=TrainConfig(
            steps=6,
            dtype="float32",
            remat="none",
            eval_every=3,
            eval_rows=8,
            save_every=3,
            keep=9,
            log_every=1,
        ),
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Where this session keeps tokens and compiled programs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def caches(cache):
    """Touch nothing outside of the tests' folders."""
    with own_caches(cache):
        yield


@pytest.fixture(scope="session")
def whole(run, cache, tmp_path_factory):
    """The folder of an uninterrupted run, and what it printed."""
    out, lines = tmp_path_factory.mktemp("runs") / "whole", []
    with own_caches(cache):
        train(run, out, say=lines.append)
    return out, lines


@pytest.fixture(scope="session")
def stopped(run, cache, tmp_path_factory):
    """The folder of the same run, which got SIGTERM in its third step, and what it printed."""
    out, lines = tmp_path_factory.mktemp("runs") / "stopped", []
    with own_caches(cache):
        train(run, out, say=terminating(3, lines))
    return out, lines


@pytest.fixture
def again(stopped, tmp_path) -> Path:
    """A copy of the stopped run to resume."""
    return Path(shutil.copytree(stopped[0], tmp_path / "again"))
