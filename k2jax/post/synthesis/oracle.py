"""The scripted agent: a plan that fulfils a task's goals, and who plays it."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.post.synthesis.field_schema import shown_fields
from k2jax.post.synthesis.goals import Goal
from k2jax.post.synthesis.speech import join, speak
from k2jax.post.synthesis.toolset import Tool
from k2jax.post.synthesis.world import Record, Result, World
from k2jax.post.synthesis.world_file import Entity

Step = dict[str, Any]
LEFT = "All right, I left everything as it is: I did not {core}."
DONE = ("Done: ", "That is done: ", "All set: ", "It worked: ")
SORRY = ("I am sorry, but I could not {core}: {why}.", "I cannot {core}: {why}.")
CONFIRM = (
    "I am about to {core}. Shall I go ahead?",
    "Before I do this, please confirm: {core}. May I proceed?",
    "This would {core}{effect}. Do you want me to go ahead?",
)


class Planner:
    """Plans goals in a world that it changes on the way; steps are calls and texts."""

    def __init__(self, world: World, persona: Mapping[str, str], rng: random.Random):
        """Plan for a user of that persona, in a world without faults."""
        self.world, self.persona, self.rng = world, persona, rng
        self.is_broken = False  # a goal came out otherwise than it was meant to
        self.steps: list[Step] = []
        self.answers: list[str] = []
        self.searched: set[tuple[str, str]] = set()  # searches that need not be repeated

    def add(self, goal: Goal) -> str:
        """Plan one goal; the answer to the user."""
        if goal.facts and self.persona["disclosure"] == "asked":
            self._say(f"Of course. Could you tell me the {join(list(goal.facts))}?")
        if lookups := [one for one in goal.lookups if one not in self.searched]:
            self._call(*((tool, {"query": query}) for tool, query in lookups))
            self.searched |= set(lookups)
        tool = self.world.tools[goal.tool]
        answer = self._write(goal, tool) if tool.writes else self._read(goal, tool)
        if self.persona["disclosure"] == "all at once":
            self.answers.append(answer)
        else:
            self._say(answer)
        return answer

    def finish(self) -> list[Step]:
        """The whole plan."""
        if self.answers:
            self._say(" ".join(self.answers))
        return self.steps

    def _say(self, text: str) -> None:
        self.steps.append({"say": text})

    def _call(self, *calls: tuple[str, dict[str, Any]]) -> list[Result]:
        self.steps.append({"calls": [[name, dict(arguments)] for name, arguments in calls]})
        return [self.world.call(name, arguments) for name, arguments in calls]

    def _read(self, goal: Goal, tool: Tool) -> str:
        (result,) = self._call((goal.tool, goal.arguments))
        if "error" in result:
            self.is_broken = True
            return ""
        entity = self.world.entities[tool.entity]
        many = entity.plural.replace("_", " ")
        if tool.kind == "count":
            return f"I counted {result['count']} {many} like that."
        if tool.kind == "total":
            return f"Together that is {speak(result['total'], entity.field(tool.field))}."
        if tool.kind == "get":
            return _describe_field(goal, entity, result[tool.entity])
        names = [str(record[entity.key]) for record in result[entity.plural]]
        return f"These are the {many}: {join(names)}." if names else f"There are no {many}."

    def _write(self, goal: Goal, tool: Tool) -> str:
        arguments = dict(goal.arguments)
        looks = self._look(tool, goal) if self.rng.random() < 0.3 else ""
        if goal.confirm and not goal.refused:
            effect = ""
            if looks or goal.declines or self.rng.random() < 0.5:
                (result,) = self._call((goal.tool, arguments))
                effect = result.get("error", {}).get("summary", "").partition("; ")[2]
            details = "".join(f", {label} {value}" for label, value in goal.facts.items())
            parts = {"core": goal.core + details, "effect": effect and f" ({effect})"}
            self._say(self.rng.choice(CONFIRM).format(**parts))
            if goal.declines:
                return LEFT.format(core=goal.core)
            arguments["confirmed"] = True
        (result,) = self._call((goal.tool, arguments))
        self.is_broken |= result.get("error", {}).get("code", "") != goal.refused
        if "error" in result:
            why = result["error"]["message"]
            named = f" ({goal.subjects[0]})" if tool.kind == "create" and goal.subjects else ""
            return self.rng.choice(SORRY).format(core=goal.core + named, why=why)
        return self.rng.choice(DONE) + self._describe(goal, tool, result)

    def _look(self, tool: Tool, goal: Goal) -> str:
        """Read the record first, where that is possible."""
        getter = f"get_{tool.entity}"
        if tool.kind == "create" or getter not in self.world.tools:
            return ""
        self._call((getter, {self.world.tools[getter].id_name: goal.arguments[tool.id_name]}))
        return getter

    def _describe(self, goal: Goal, tool: Tool, result: Result) -> str:
        entity = self.world.entities[tool.entity]
        if "deleted" in result:
            return f"{result['deleted']} no longer exists."
        if tool.kind == "transfer":
            amount = speak(goal.arguments["amount"], entity.field(tool.field))
            names = [
                f"{result[side]['id']} ({result[side][entity.key]})" for side in ("from", "to")
            ]
            return f"{amount} went from {names[0]} to {names[1]}."
        record = result[tool.entity]
        return _describe_write(goal, tool, entity, record)


def _describe_field(goal: Goal, entity: Entity, record: Record) -> str:
    label = goal.core.removeprefix("tell me the ").partition(" of the ")[0]
    field = next(f for f in entity.fields if f.label == label)
    return f"The {label} of {record[entity.key]} is {speak(record[field.name], field)}."


def _describe_write(goal: Goal, tool: Tool, entity: Entity, record: Record) -> str:
    name = f"{record['id']} ({record.get(entity.key)})"
    changed = next(iter(goal.arguments.get("changes", {tool.field: None})))
    if tool.kind in ("update", "adjust", "assign") and entity.has(changed):
        field = entity.field(changed)
        return f"the {field.label} of {name} is now {speak(record[changed], field)}."
    if tool.kind == "move":
        return f"{name} is now {record['status']}."
    if tool.kind in ("tag", "untag"):
        return f"the labels of {name} are now: {speak(record['tags'])}."
    if tool.kind == "note":
        return f"your note is on {name} now."
    shown = [n for n in shown_fields(entity) if n not in ("id", entity.key) and record.get(n)]
    details = "".join(f", {n.replace('_', ' ')} {record[n]}" for n in shown)
    return f"{name} is stored{details}."


class Oracle:
    """Plays a plan, and repeats calls that failed because a service did not answer."""

    name = "oracle"

    def __init__(self, plan: Sequence[Step]):
        """Play this plan from its beginning."""
        self.steps = list(plan)
        self.next = 0

    def reply(self, messages: Sequence[Mapping[str, Any]], tools: Any = ()) -> dict[str, Any]:
        """The assistant's next message."""
        if failed := _failed_calls(messages):
            return _calls_message(failed)
        if self.next >= len(self.steps):
            return {"role": "assistant", "content": "I have nothing to add."}
        step = self.steps[self.next]
        self.next += 1
        if "say" in step:
            return {"role": "assistant", "content": step["say"]}
        return _calls_message(step["calls"])


def _calls_message(calls: Sequence[Sequence[Any]]) -> dict[str, Any]:
    functions = [{"name": name, "arguments": json.dumps(args)} for name, args in calls]
    calls_ = [{"id": "", "type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": calls_}


def _failed_calls(messages: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The last calls that a service did not answer."""
    failed = set()
    for message in reversed(messages):
        if message["role"] != "tool":
            break
        if '"unavailable"' in message["content"]:
            failed.add(message["tool_call_id"])
    if not failed:
        return []
    calls = next(m for m in reversed(messages) if m.get("tool_calls"))["tool_calls"]
    again = [call["function"] for call in calls if call["id"] in failed]
    return [[function["name"], json.loads(function["arguments"])] for function in again]
