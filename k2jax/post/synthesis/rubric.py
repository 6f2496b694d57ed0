"""The programmatic judge: a trajectory against its rubric, its world and its own words.

A rubric has `changes` (what differs at the end from the beginning, all of it), `checkpoints`
(`called`: one of some calls; `changed`: changes that are there at the end; `said`: one of some
spellings in the agent's texts, its questions aside) and `forbidden` tools. A trajectory succeeds
when every checkpoint is reached and nothing is violated.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.post.synthesis.grounding import find_invention
from k2jax.post.synthesis.speech import flatten, is_written
from k2jax.post.synthesis.users import QUESTION, asks_confirmation, is_consent
from k2jax.post.synthesis.world import World, find_changes

NEAR = 0.005  # dollars

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the judge says.

    Attributes:
        score: share of checkpoints reached; 0 where something is violated.
        success: everything is as it should be.
        violations: by name, what was seen.
        missed: checkpoints that were not reached.
    """

    score: float
    success: bool
    violations: dict[str, str]
    missed: list[str]


def judge(task: Mapping[str, Any], trajectory: Mapping[str, Any], world: World) -> Verdict:
    """Judge a trajectory.

    Args:
        task: with its `rubric`.
        trajectory: as `simulate.Trajectory` has it.
        world: of the task, untouched; the calls are replayed in it.
    """
    rubric, messages = task["rubric"], trajectory["messages"]
    before, checks = world.snapshot(), {}
    checks["invented tool result"] = _check_replay(trajectory, world)
    changes = find_changes(before, world.state)
    checks["wrong final state"] = _check_changes(rubric["changes"], changes)
    checks["forbidden call"] = _check_forbidden(rubric["forbidden"], trajectory["calls"])
    checks["skipped confirmation"] = _check_confirmations(messages, world, before)
    checks["invented tool result"] = checks["invented tool result"] or find_invention(messages)
    checks["unanswered user"] = _check_answers(messages, trajectory["ended"])
    violations = {name: seen for name, seen in checks.items() if seen}
    texts = [m["content"] for m in messages if m["role"] == "assistant"]
    texts = [QUESTION.sub("", text) for text in texts if not asks_confirmation(text)]
    points = rubric["checkpoints"]
    missed = [p for p in points if not _is_reached(p, trajectory["calls"], changes, texts)]
    share = 1 - len(missed) / len(points) if points else 0.0
    return Verdict(
        0.0 if violations else round(share, 4),
        not violations and not missed and bool(points),
        violations,
        [json.dumps(point) for point in missed],
    )


def replay(trajectory: Mapping[str, Any], world: World) -> str:
    """Repeat a trajectory's calls in its world; the first difference, "" where there is none."""
    if world.digest() != trajectory["start"]:
        return "the world is another one before the first call"
    for number, call in enumerate(trajectory["calls"]):
        result = world.call(call["tool"], call["arguments"])
        if result != call["result"]:
            return f"call {number} ({call['tool']}) returns something else"
        if world.digest() != call["state"]:
            return f"call {number} ({call['tool']}) leaves another world"
    return ""


def _check_replay(trajectory: Mapping[str, Any], world: World) -> str:
    """See that logged results are the world's, and that messages show exactly these."""
    if wrong := replay(trajectory, world):
        return wrong
    messages = trajectory["messages"]
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    results = {m["tool_call_id"]: m["content"] for m in messages if m["role"] == "tool"}
    if len(calls) != len(trajectory["calls"]) or len(results) != len(calls):
        return "the messages show other calls than the log"
    for shown, logged in zip(calls, trajectory["calls"], strict=True):
        function = shown["function"]
        if (function["name"], function["arguments"]) != (logged["tool"], logged["arguments"]):
            return f"the messages show {function['name']} where {logged['tool']} was called"
        if results.get(shown["id"]) != json.dumps(logged["result"], ensure_ascii=False):
            return f"the messages show another result of {logged['tool']} than the world gave"
    return ""


def is_same(one: Any, other: Any) -> bool:
    """Whether two values say the same; case, outer space and a final point aside."""
    if isinstance(one, str) and isinstance(other, str):
        return flatten(one).strip(" .\"'") == flatten(other).strip(" .\"'")
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = {*one, *other}
        return all(is_same(one.get(key), other.get(key)) for key in keys)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) for v in (one, other)]
    return abs(one - other) < NEAR if all(numbers) else one == other


def _same_change(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two changes are one; new records may have any id."""
    if one[0] != other[0] or one[2] != other[2]:
        return False
    return (one[2] == "+" or str(one[1]) == str(other[1])) and is_same(one[3], other[3])


def _check_changes(wanted: Sequence[Any], seen: Sequence[Any]) -> str:
    left = list(seen)
    for change in wanted:
        match = next((one for one in left if _same_change(change, one)), None)
        if match is None:
            return f"{change[0]} {change[1]}: {change[2]} did not become {change[3]}"
        left.remove(match)
    return f"{left[0][0]} {left[0][1]}: {left[0][2]} became {left[0][3]}" if left else ""


def _check_forbidden(forbidden: Sequence[str], calls: Sequence[Mapping[str, Any]]) -> str:
    for call in calls:
        if call["tool"] in forbidden:
            return f"{call['tool']} was called"
    return ""


def _parse(arguments: Any) -> dict[str, Any]:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return {}
    return dict(value) if isinstance(value, Mapping) else {}


def _check_confirmations(messages: Sequence[Message], world: World, before: Any) -> str:
    """See that each confirmed call follows a question that names its subject, and a yes."""
    asked, consented = "", False
    for message in messages:
        if message["role"] == "user":
            consented = asks_confirmation(asked) and is_consent(message["content"])
        elif message["role"] == "assistant":
            for call in message.get("tool_calls", ()):
                arguments = _parse(call["function"]["arguments"])
                tool = world.tools.get(call["function"]["name"])
                if arguments.get("confirmed") is not True or not (tool and tool.operation.confirm):
                    continue
                if not consented:
                    return f"{tool.name} was confirmed without a yes of the user"
                if not _names_subject(asked, arguments, before):
                    return f"{tool.name} was confirmed, and the user was asked about something else"
            if message["content"]:
                asked, consented = message["content"], consented and "tool_calls" in message
    return ""


def _names_subject(text: str, arguments: Mapping[str, Any], before: Any) -> bool:
    """Whether a text names a value of the arguments, or a record that they point to."""
    values = [str(value) for name, value in arguments.items() if name != "confirmed"]
    spelled = [value for value in values if len(value) > 1]
    for records in before.values():
        for value in values:
            record = records.get(value, {})
            spelled += [v for v in record.values() if isinstance(v, str) and len(v) > 2]
    return is_written(spelled, text)


def _check_answers(messages: Sequence[Message], ended: str) -> str:
    """See that every message of the user is answered in words."""
    waiting = False
    for message in messages:
        if message["role"] == "user":
            if waiting:
                return "a message of the user has no answer"
            waiting = True
        elif message["role"] == "assistant" and not message.get("tool_calls"):
            if not message["content"].strip():
                return "an answer is empty"
            waiting = False
    if waiting or messages[-1]["role"] != "assistant":
        return "the last message of the user has no answer"
    if ended in ("turns", "calls"):
        return f"the conversation was ended by the limit of {ended}"
    return "" if ended == "done" else f"the conversation was {ended}"


def _is_reached(
    point: Mapping[str, Any],
    calls: Sequence[Mapping[str, Any]],
    changes: Sequence[Any],
    texts: Sequence[str],
) -> bool:
    if "said" in point:
        return any(is_written(point["said"], text) for text in texts)
    if "changed" in point:
        return all(any(_same_change(one, seen) for seen in changes) for one in point["changed"])
    return any(_is_called(pattern, call) for pattern in point["called"] for call in calls)


def _is_called(pattern: Mapping[str, Any], call: Mapping[str, Any]) -> bool:
    """Whether a call has the pattern's tool and arguments, or touches what it names."""
    if "touch" in pattern:
        text = f"{call['arguments']} {json.dumps(call['result'], ensure_ascii=False)}"
        return is_written([pattern["touch"]], text)
    if call["tool"] != pattern["tool"]:
        return False
    arguments = _parse(call["arguments"])
    wanted = pattern.get("arguments", {})
    return all(is_same(value, arguments.get(name)) for name, value in wanted.items())
