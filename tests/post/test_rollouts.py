"""Rollouts with an engine that writes what it is told to."""

import math

import pytest

from k2jax.config import ConfigError
from k2jax.inference.request import Result, TokenLogprob
from k2jax.post.environment import Comparison, Observation, SingleTurn, StepResult, open_environment
from k2jax.post.rollouts import Sampler, Try, summarise
from k2jax.post.toy_tasks import is_held_out, list_sortings, list_sums, sum2
from k2jax.text.kimi_template import encode
from k2jax.text.kimi_tokenizer import Tokenizer

TOKENIZER = Tokenizer({bytes([i]): i for i in range(256)})
USER = {"role": "user", "content": "go"}


class Script:
    """Stands in for an engine: writes the next of its lines, cut at the budget."""

    context = 400

    def __init__(self, *lines):
        self.lines, self.requests = list(lines), []

    def run(self, requests):
        results = []
        for request in requests:
            self.requests.append(request)
            line = self.lines.pop(0)
            ids = TOKENIZER.encode(line, special=True)
            if not line.endswith("<|im_end|>"):
                ids.append(TOKENIZER.eos)
            reason = "stop" if len(ids) <= request.max_new_tokens else "length"
            ids = tuple(ids[: request.max_new_tokens])
            logprobs = tuple(TokenLogprob(i, -0.5) for i in ids)
            results.append(Result(ids, logprobs=logprobs, finish_reason=reason))
        return results


def single(reward, budget=8):
    return SingleTurn("own", budget, lambda split: ["a=", "b="], reward)


def sample(env, *lines, tries=1):
    engine = Script(*lines)
    rollouts = Sampler(engine, TOKENIZER, env).sample(
        "train", [Try(0, i) for i in range(tries)], 1.0
    )
    return rollouts, engine


def test_a_reward_sees_the_prompt_and_the_reply_without_its_end():
    seen = []

    def reward(prompt, reply):
        seen.append((prompt, reply))
        return {"form": 0.25, "content": 1}

    (rollout,), _ = sample(single(reward), "41")
    assert seen == [("a=", "41")]
    assert rollout.reward == 1.25 and rollout.parts == {"form": 0.25, "content": 1.0}
    assert rollout.ids == [TOKENIZER.bos, *b"a=41", TOKENIZER.eos]
    assert rollout.own == [False] * 3 + [True] * 3 and rollout.own_count == 3


def test_truncated_samples_are_counted_apart_and_not_judged():
    rollouts, _ = sample(single(lambda *_: 1.0, budget=3), "41", "4100", tries=2)
    assert [r.is_truncated for r in rollouts] == [False, True]
    assert not rollouts[1].parts
    counts = summarise(rollouts)
    assert (counts["accuracy"], counts["truncated"], counts["wrong"]) == (0.5, 0.5, 0.0)


def test_a_reward_that_raises_or_is_not_finite_fails_its_sample_alone():
    def reward(prompt, reply):
        return {"1": 1.0, "2": math.nan, "3": 0.0}[reply]

    rollouts, _ = sample(single(reward), "1", "2", "4", "3", tries=4)
    assert [bool(r.failure) for r in rollouts] == [False, True, True, False]
    counts = summarise(rollouts)
    assert counts["failed"] == 2 and counts["accuracy"] == 0.5 and counts["wrong"] == 0.5


class Talk:
    """Answers twice, once with a tool's result."""

    name, budget = "talk", 300

    def __init__(self):
        self.replies = []

    def count(self, split):
        return 1

    def reset(self, split, number, seed):
        return self, Observation(messages=(USER,))

    def step(self, reply):
        self.replies.append(reply)
        if len(self.replies) == 1:
            call = reply.message["tool_calls"][0]
            result = {"role": "tool", "tool_call_id": call["id"], "content": "7"}
            return StepResult({"call": 0.5}, Observation(messages=(result,)))
        return StepResult({"call": 0.0, "answer": 1.0})


CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}"
    "<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
)


def test_turns_are_appended_as_the_template_writes_them_and_never_tokenised_again():
    env = Talk()
    (rollout,), engine = sample(env, CALL, "7<|im_end|>")
    assert rollout.parts == {"call": 0.5, "answer": 1.0}
    first, second = (list(request.prompt) for request in engine.requests)
    assert first == encode(TOKENIZER, [USER])
    written = TOKENIZER.encode(CALL, special=True)
    assert second[: len(first) + len(written)] == first + written
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "7"},
    ]
    assert second == encode(TOKENIZER, history)
    assert sum(rollout.own) == rollout.own_count == len(written) + 2


def test_a_turn_that_cannot_be_continued_fails_its_sample_alone():
    """The model calls twice under one id, so results could not be told apart."""
    call = CALL.removeprefix("<|tool_calls_section_begin|>").partition("<|tool_calls_section_e")[0]
    twice = CALL.replace(call, 2 * call)
    (rollout,), _ = sample(Talk(), twice)
    assert "two tool calls with the id 'functions.f:0'" in rollout.failure
    assert summarise([rollout])["failed"] == 1


def test_samples_of_a_task_are_compared_when_all_have_ended():
    def compare(prompt, replies):
        assert (prompt, replies) == ("a=", ["1", "22"])
        return Comparison([{"wins": 0.25}, {"wins": 0.75}], {"disagreement": 0.5})

    env = SingleTurn("own", 3, lambda split: ["a="], lambda p, r: 0.5, compare=compare)
    rollouts, _ = sample(env, "1", "22", "4100", tries=3)
    assert [r.parts.get("wins") for r in rollouts] == [0.25, 0.75, None]
    assert rollouts[0].reward == 0.75 and rollouts[0].notes == {"disagreement": 0.5}
    rollouts, _ = sample(env, "1", "4100", tries=2)
    assert not rollouts[0].failure and rollouts[0].reward == 0.5  # alone, it is not compared
    env = SingleTurn("own", 3, lambda split: ["a="], compare=lambda p, r: 1 / 0)
    rollouts, _ = sample(env, "1", "2", "4100", tries=3)
    assert [bool(r.failure) for r in rollouts] == [True, True, False]
    with pytest.raises(ConfigError, match="own has neither a reward nor a comparison"):
        SingleTurn("own", 3, lambda split: ["a="])


TEAM = """
import os, time
from k2jax.post.environment import Comparison, SingleTurn

def reward(prompt, reply):
    time.sleep(0.2)  # the other process takes the next one meanwhile
    return {"process": os.getpid()}

def best(prompt, replies):
    return Comparison([{"best": reply == max(replies)} for reply in replies], {"of": len(replies)})

def team():
    return SingleTurn("team", 8, lambda split: ["a="], reward, compare=best, workers=2)
"""


def test_an_environment_may_ask_for_several_processes(tmp_path):
    (tmp_path / "own.py").write_text(TEAM)
    made = open_environment(f"{tmp_path / 'own.py'}:team")
    rollouts, _ = sample(made, *"wxyz", tries=4)
    assert [r.parts["best"] for r in rollouts] == [0, 0, 0, 1]
    assert len({r.parts["process"] for r in rollouts}) == 2
    assert rollouts[0].notes == {"of": 4} and made.count("train") == 1
    made.close()


def test_no_token_left_for_a_turn_is_a_truncation():
    env = Talk()
    env.budget = len(TOKENIZER.encode(CALL, special=True))
    (rollout,), engine = sample(env, CALL, "7<|im_end|>")
    assert rollout.is_truncated and len(engine.requests) == 1


def test_draws_differ_by_seed_alone():
    _, engine = sample(single(lambda *_: 1.0), "1", "1", tries=2)
    _, again = sample(single(lambda *_: 1.0), "1", "1", tries=2)
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[0] != seeds[1]
    assert seeds == [request.sampling.seed for request in again.requests]


def test_held_out_prompts_are_a_fixed_eighth():
    for answers in (list_sums(), list_sortings()):
        share = sum(map(is_held_out, answers)) / len(answers)
        assert 0.1 < share < 0.15
    env = sum2()
    assert env.count("train") + env.count("heldout") == 10_000
    _, seen = env.reset("heldout", 3, 0)
    assert is_held_out(seen.text)
    (right,), _ = sample(env, "x")
    assert not right.reward


def test_an_own_environment_is_a_function_in_a_file(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from k2jax.post.environment import SingleTurn\n"
        "def squares():\n"
        "    return SingleTurn('squares', 8, lambda split: ['2'], lambda p, r: float(r == '4'))\n"
    )
    assert open_environment(f"{file}:squares").name == "squares"
    for name, words in (
        ("sum3", "sum2"),
        (f"{file}:square", "squares"),
        (f"{tmp_path}/none.py:f", "no file"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_environment(name)
