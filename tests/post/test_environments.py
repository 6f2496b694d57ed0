"""Environments that come with k2jax: tools, mathematics, code, reasoning-gym."""

import json

import pytest

from k2jax.config import ConfigError
from k2jax.inference.request import Result, TokenLogprob
from k2jax.post.environment import Reply, open_environment
from k2jax.post.graded_tasks import GradedTasks
from k2jax.post.reasoning import ReasoningGym
from k2jax.post.rollouts import Sampler, Try
from k2jax.post.synthesis.oracle import Oracle
from k2jax.post.synthesis.pipeline import FILES
from k2jax.post.synthesis.stored import read_lines
from k2jax.post.tool_worlds import ToolWorlds
from k2jax.text.kimi_tokenizer import Tokenizer


def follow_oracle(environment, split, number):
    """The reward of the task's own plan, and how many turns it took."""
    episode, seen = environment.reset(split, number, 0)
    messages = list(seen.messages)
    oracle, turns = Oracle(episode.task["plan"]), 0
    while True:
        message = oracle.reply(messages)
        for i, call in enumerate(message.get("tool_calls", ())):
            call["id"] = f"call-{turns}-{i}"
        result = episode.step(Reply(message["content"], message=message))
        turns += 1
        if result.observation is None:
            return result.reward, turns
        messages += [message, *result.observation.messages]


def test_the_oracle_earns_all_and_silence_nothing(made):
    environment = ToolWorlds(made[0])
    assert environment.count("train") + environment.count("heldout") == 24
    for number in range(6):
        reward, turns = follow_oracle(environment, "train", number)
        assert sum(reward.values()) == 1
        assert turns >= 2
        episode, seen = environment.reset("train", number, 0)
        assert [one["role"] for one in seen.messages] == ["system", "user"]
        assert seen.tools
        result = episode.step(Reply("Done."))
        while result.observation is not None:
            result = episode.step(Reply("Done."))
        assert sum(result.reward.values()) == 0


class Planned:
    """Stands in for an engine: writes a plan's steps as a model does, in tokens."""

    context = 65536
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})

    def __init__(self, plan):
        self.steps, self.calls = list(plan), 0

    def run(self, requests):
        return [self.write(request) for request in requests]

    def write(self, request):
        step = self.steps.pop(0)
        text = step.get("say", "")
        for i, (name, arguments) in enumerate(step.get("calls", ())):
            text += "" if i else "<|tool_calls_section_begin|>"
            text += f"<|tool_call_begin|>functions.{name}:{self.calls}"
            text += f"<|tool_call_argument_begin|>{json.dumps(arguments)}<|tool_call_end|>"
            self.calls += 1
        text += "<|tool_calls_section_end|>" if "calls" in step else ""
        ids = tuple(self.tokenizer.encode(text + "<|im_end|>", special=True))
        logprobs = tuple(TokenLogprob(i, -0.5) for i in ids)
        return Result(ids, logprobs=logprobs, finish_reason="stop")


def test_the_trainers_rollouts_play_tool_worlds(made):
    """Token ids all the way: what the engine writes is parsed, acted on and judged."""
    environment = ToolWorlds(made[0], budget=20_000)
    calls = {one["task"]: one["calls"] for one in read_lines(made[0] / FILES["run"])}
    for number, task in enumerate(environment._tasks["train"][:6]):
        if "unavailable" in json.dumps(calls[task["id"]]):
            continue
        sampler = Sampler(Planned(task["plan"]), Planned.tokenizer, environment)
        (rollout,) = sampler.sample("train", [Try(number, 0)], 1.0)
        assert rollout.reward == 1, rollout.failure
        assert not rollout.is_truncated


def test_results_bear_the_ids_of_the_models_calls(made):
    episode, seen = ToolWorlds(made[0]).reset("train", 0, 0)
    call = {"name": seen.tools[0]["function"]["name"], "arguments": "{}"}
    calls = [{"id": f"mine-{i}", "type": "function", "function": call} for i in range(2)]
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    answers = episode.step(Reply("", message=message)).observation.messages
    assert [one["tool_call_id"] for one in answers] == ["mine-0", "mine-1"]


def test_mathematics_is_graded_as_in_evaluation(tmp_path):
    pytest.importorskip("math_verify")
    file = tmp_path / "math.jsonl"
    problem = {"problem": "What is 1/2 + 1/4?", "answer": "\\frac{3}{4}"}
    file.write_text("".join(json.dumps({**problem, "unique_id": i}) + "\n" for i in "abc"))
    environment = open_environment(f"math:{file}")
    for text, score in (("It is $\\boxed{0.75}$.", 1), ("\\boxed{1}", 0), ("", 0)):
        episode, seen = environment.reset("train", 0, 0)
        assert "1/2" in seen.messages[0]["content"]
        assert episode.step(Reply(text, message={"role": "assistant", "content": text})).reward == {
            "score": score
        }


@pytest.mark.parametrize(("family", "form"), [("code", "{}"), ("code-chat", "So:\n```py\n{}\n```")])
def test_programs_are_run_in_the_sandbox(family, form, tmp_path):
    file = tmp_path / "code.jsonl"
    head = "def twice(x):\n"
    tests = "def check(candidate):\n    assert candidate(2) == 4\n"
    problem = {"prompt": head, "entry_point": "twice", "test": tests, "canonical_solution": ""}
    file.write_text("".join(json.dumps({**problem, "task_id": i}) + "\n" for i in "abc"))
    environment = open_environment(f"{family}:{file}")
    assert environment.workers >= 1
    for body, score in (("    return 2 * x", 1), ("    return x", 0)):
        episode, seen = environment.reset("train", 0, 0)
        text = form.format(body if family == "code" else head + body)
        message = {"role": "assistant", "content": text} if seen.messages else None
        assert bool(seen.messages) == (family == "code-chat")
        assert episode.step(Reply(text, message=message)).reward == {"score": score}


def test_a_task_of_choices_is_no_environment():
    from k2jax.evals.task import Choose, Item, Task

    class Choices(Task):
        name = "choices"

        def items(self):
            return [Item("1", Choose("a", ("b", "c")))]

    with pytest.raises(ConfigError, match="choices asks for choices"):
        GradedTasks(Choices())


def test_reasoning_gym_verifies_and_its_splits_are_apart():
    pytest.importorskip("reasoning_gym")
    environment = ReasoningGym("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    questions = {
        split: {environment.reset(split, i, 0)[1].messages[0]["content"] for i in range(40)}
        for split in ("train", "heldout")
    }
    assert not questions["train"] & questions["heldout"]
    episode, _ = environment.reset("train", 0, 0)
    right = episode.entry["answer"]
    assert episode.step(Reply(f"Well: <answer>{right}</answer>")).reward == {"score": 1.0}
    assert episode.step(Reply("I do not know")).reward["score"] < 0.1
    with pytest.raises(ConfigError, match="did you mean 'chain_sum'"):
        ReasoningGym("chain_sums")
