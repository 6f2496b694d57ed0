"""Environments of other people's code: what raises, hangs or is no number fails one sample."""

import math

import pytest

from k2jax.config import ConfigError
from k2jax.post.environment import Observation, Reply, open_environment
from k2jax.post.guarded import Guarded, RewardError

OWN = """
import os, time
import numpy as np
from k2jax.post.environment import Comparison, Observation, SingleTurn, StepResult

def reward(prompt, reply):
    print("this is no answer")
    if reply == "raise":
        raise ValueError("no such thing")
    if reply == "hang":
        time.sleep(1000)
    if reply == "exit":
        os._exit(3)
    if reply == "numpy":
        return {"right": np.float32(0.5)}
    return {"right": float(reply == prompt), "nan": float("nan") if reply == "nan" else 0.0}

def own():
    return SingleTurn("own", 8, lambda split: ["a", "b", "c"], reward)

def best(prompt, replies):
    top = max(replies)
    return Comparison([{"best": float(r == top)} for r in replies], {"of": len(replies)})

def compared():
    return SingleTurn("compared", 8, lambda split: ["a"], compare=best, seconds=45)

class Counting:
    name, budget = "counting", 8
    def count(self, split):
        return 5
    def reset(self, split, number, seed):
        if number == 4:
            raise KeyError("no such task")
        return Turns(), Observation("go")

class Turns:
    heard = ""
    def step(self, reply):
        if reply.text == "hang":
            time.sleep(1000)
        self.heard += reply.text
        done = len(self.heard) == 3
        if not done:
            return StepResult({}, Observation(self.heard))
        return StepResult({"heard": float(self.heard == "abc")})

def turns():
    return Counting()
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(OWN)
    return file


@pytest.fixture(scope="module")
def environment(own):
    made = open_environment(f"{own}:own")
    assert isinstance(made, Guarded)
    yield made
    made.close()


def step(environment, number, text):
    episode, _ = environment.reset("train", number, 0)
    return episode.step(Reply(text))


def test_a_reward_of_ones_own_is_a_function(environment):
    assert (environment.name, environment.budget, environment.count("heldout")) == ("own", 8, 3)
    assert environment.reset("train", 1, 0)[1] == Observation("b")
    assert step(environment, 1, "b").reward == {"right": 1.0, "nan": 0.0}


def test_what_raises_fails_that_sample_alone(environment):
    with pytest.raises(RewardError, match="ValueError: no such thing"):
        step(environment, 0, "raise")
    assert step(environment, 0, "a").reward["right"] == 1


def test_a_part_may_be_numpys(environment):
    assert step(environment, 0, "numpy").reward == {"right": 0.5}


def test_what_is_no_number_is_passed_on(environment):
    assert math.isnan(step(environment, 0, "nan").reward["nan"])


def test_what_ends_its_process_fails_that_sample_alone(environment):
    with pytest.raises(RewardError, match="its process ended"):
        step(environment, 0, "exit")
    assert step(environment, 2, "c").reward["right"] == 1


def test_comparisons_are_made_there_too_and_an_environment_names_its_limit(environment, own):
    made = open_environment(f"{own}:compared")
    assert (made._seconds, environment._seconds, environment.compare) == (45, 10, None)
    assert made.compare("train", 0, ["x", "y"]) == ([{"best": 0.0}, {"best": 1.0}], {"of": 2})
    with pytest.raises(RewardError, match="ValueError"):
        made.compare("train", 0, [])
    made.close()


def test_other_episodes_outlive_one_that_hangs(own):
    environment = Guarded(f"{own}:turns", seconds=5.0)
    with pytest.raises(RewardError, match="no such task"):
        step(environment, 4, "a")
    first, _ = environment.reset("train", 0, 0)
    second, _ = environment.reset("train", 1, 0)
    assert first.step(Reply("a")).observation == Observation("a")
    with pytest.raises(RewardError, match="longer than 5 s"):
        second.step(Reply("hang"))
    assert first.step(Reply("b")).observation == Observation("ab")
    assert first.step(Reply("c")).reward == {"heard": 1.0}
    environment.close()


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("nowhere.py:own", "no file nowhere.py"),
        ("tols:x", "no environment 'tols:x'; did you mean 'tools:...'"),
        ("math:", "environment 'math:' needs more"),
        ("tools:nowhere", "worlds.jsonl is missing; run its stage first"),
        ("math:nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_mistakes_are_named(name, mistake):
    with pytest.raises(ConfigError, match=mistake.replace("(", "\\(")):
        open_environment(name)


def test_a_function_that_is_not_there_is_named(own):
    with pytest.raises(ConfigError, match="has no 'onw'; did you mean 'own'"):
        open_environment(f"{own}:onw")
