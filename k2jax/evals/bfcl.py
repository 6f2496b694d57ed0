"""BFCL: calls of functions, in one turn and in several, asked as tools of a chat.

Read are the package's files: questions (`BFCL_v4_CATEGORY.json`, JSON lines of `id`, `question`,
`function`) and next to them `possible_answer/`, and for several turns `multi_turn_func_doc/`. What
the model reads is what the leaderboard gives to models with function calling. Source: [BFCL].
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError
from k2jax.evals import bfcl_check, bfcl_turns
from k2jax.evals.records import digest_files, read_records, require_unique
from k2jax.evals.task import (
    FAILED,
    PASSED,
    UNPARSED,
    Answer,
    Generate,
    Item,
    Task,
    TaskSettings,
    Verdict,
)

STEPS = 20  # of a turn; a model that goes on longer is stopped
MORE = "I have updated some more functions you can choose from. What about now?"
OPENAI_TYPES = {
    **dict.fromkeys(("integer", "byte", "short", "long", "Bigint"), "integer"),
    **dict.fromkeys(("number", "float", "double"), "number"),
    **dict.fromkeys(("boolean", "bool", "Boolean"), "boolean"),
    **dict.fromkeys(("array", "list", "tuple", "ArrayList", "Array", "Queue", "Stack"), "array"),
    **dict.fromkeys(("dict", "object", "HashMap", "Hashtable"), "object"),
    **dict.fromkeys(("string", "any", "char", "Any", "String"), "string"),
}
SYNTAX = {"java": "Java 8 SDK", "javascript": "JavaScript", "python": "Python 3"}
Entry = dict[str, Any]


class Bfcl(Task):
    """One category of BFCL."""

    settings = TaskSettings(max_new_tokens=8192)

    def __init__(self, path: str | Path):
        """Read a file of questions, and what lies next to it.

        Args:
            path: questions of one category.

        Raises:
            ConfigError: a file is missing or malformed, or a conversation of several turns needs
                the package `bfcl-eval`.
        """
        path = Path(path)
        self._entries = read_entries(path)
        self.category = _category(self._entries[0]["id"])
        files, expected = [path], [None] * len(self._entries)
        if not self.category.endswith("relevance"):
            files.append(path.parent / "possible_answer" / path.name)
            expected = _read_answers(files[1], self._entries)
        if self._has_turns:
            files += _add_functions(path.parent, self._entries)
        self.name = f"bfcl-{self.category}"
        self.digest = digest_files(*files)
        self._items = [
            Item(entry["id"], self._ask_first(entry), {"entry": entry, "expected": right})
            for entry, right in zip(self._entries, expected, strict=True)
        ]
        require_unique([item.id for item in self._items], path)

    @property
    def _has_turns(self) -> bool:
        return "multi_turn" in self.category

    def items(self) -> Sequence[Item]:
        """All questions, in the order of the file."""
        return self._items

    def _ask_first(self, entry: Entry) -> Generate:
        tools = make_tools(entry["function"], self.category)
        return Generate(messages=tuple(entry["question"][0]), tools=tuple(tools))

    def follow_up(self, item: Item, answers: Sequence[Answer]) -> Generate | None:
        """The results of a step's calls, the next turn, or None at the end."""
        if not self._has_turns:
            return None
        return _Conversation(item.target["entry"], self.category).next_ask(answers)

    def grade(self, item: Item, answers: Sequence[Answer]) -> Verdict:
        """Compare the calls with the expected ones, by value, or by what they do."""
        if self._has_turns:
            turns = _Conversation(item.target["entry"], self.category).split_turns(answers)
            why = bfcl_turns.compare_turns(item.target["entry"], turns, item.target["expected"])
            extracted = json.dumps(turns)
            return Verdict(0.0, FAILED, extracted, why) if why else Verdict(1.0, PASSED, extracted)
        return self._grade_calls(item, read_calls(answers[-1]))

    def _grade_calls(self, item: Item, calls: list[dict[str, Any]] | None) -> Verdict:
        extracted = json.dumps(calls)
        if self.category.endswith("relevance"):
            has_called, should_call = bool(calls), not self.category.endswith("irrelevance")
            if has_called == should_call:
                return Verdict(1.0, PASSED, extracted)
            return Verdict(0.0, FAILED, extracted, "a call" if has_called else "no call")
        if calls is None:
            return Verdict(0.0, UNPARSED, extracted, "the arguments of a call are no JSON object")
        functions, expected = item.target["entry"]["function"], item.target["expected"]
        try:
            bfcl_check.check_calls(functions, calls, expected, self.category, underscored=True)
        except bfcl_check.Mismatch as error:
            return Verdict(0.0, FAILED, extracted, str(error))
        return Verdict(1.0, PASSED, extracted)


class _Conversation:
    """A conversation of several turns, replayed from the model's answers alone."""

    def __init__(self, entry: Entry, category: str):
        self._entry, self._category = entry, category
        self._turn, self._steps, self._is_over = 0, 0, False
        self._functions = list(entry["function"])
        self._messages: list[Mapping[str, Any]] = list(entry["question"][0])
        self._services = bfcl_turns.Services(entry)
        self._turns: list[list[list[bfcl_turns.Call]]] = [[]]

    def split_turns(self, answers: Sequence[Answer]) -> list[list[list[bfcl_turns.Call]]]:
        """Calls by turn and step."""
        for answer in answers:
            self._take(answer)
        return self._turns

    def next_ask(self, answers: Sequence[Answer]) -> Generate | None:
        """What is asked after these answers."""
        self.split_turns(answers)
        if self._is_over:
            return None
        tools = make_tools(self._functions, self._category)
        return Generate(messages=tuple(self._messages), tools=tuple(tools))

    def _take(self, answer: Answer) -> None:
        calls = read_calls(answer)
        message = dict(answer.message) or {"role": "assistant", "content": answer.text}
        if not calls:
            message.pop("tool_calls", None)  # calls that cannot be read get no results
            self._messages.append(message)
            self._begin_turn()
            return
        self._messages.append(message)
        step: list[bfcl_turns.Call] = [next(iter(call.items())) for call in calls]
        self._turns[-1].append(step)
        for call, made in zip(step, message.get("tool_calls", ()), strict=False):
            content = self._services.execute(call)
            self._messages.append({"role": "tool", "tool_call_id": made["id"], "content": content})
        self._steps += 1
        self._is_over = self._steps > STEPS

    def _begin_turn(self) -> None:
        self._turn, self._steps = self._turn + 1, 0
        if self._turn >= len(self._entry["question"]):
            self._is_over = True
            return
        self._turns.append([])
        held_back = self._entry.get("missed_function", {}).get(str(self._turn))
        if held_back:
            self._functions += held_back
            self._messages.append({"role": "user", "content": MORE})
        else:
            self._messages += self._entry["question"][self._turn]


def read_entries(path: str | Path) -> list[Entry]:
    """Lines of one of the package's files.

    Raises:
        ConfigError: it is missing or malformed.
    """
    return [record.fields for record in read_records(path, ("id",))]


def read_calls(answer: Answer) -> list[dict[str, Any]] | None:
    """Calls as `{function: {parameter: value}}`; None: arguments of one are no JSON object."""
    calls = []
    for call in answer.calls:
        try:
            values = json.loads(call.arguments)
        except ValueError:
            return None
        if not isinstance(values, dict):
            return None
        calls.append({call.name: values})
    return calls


def make_tools(functions: Sequence[Entry], category: str) -> list[Entry]:
    """Descriptions of functions as tools of the OpenAI API, the leaderboard's hints included.

    Args:
        functions: from the file of questions.
        category: says the language that values are written in.
    """
    language = next((name for name in ("javascript", "java") if name in category), "python")
    tools = []
    for function in copy.deepcopy(list(functions)):
        function["name"] = function["name"].replace(".", "_")
        function["description"] += (
            f" Note that the provided function is in {SYNTAX[language]} syntax."
        )
        properties = function["parameters"]["properties"]
        if language != "python":
            for described in properties.values():
                _describe_source(described, "JavaScript" if language == "javascript" else "Java")
        function["parameters"] |= {"type": "object", "properties": _to_openai(properties)}
        tools.append({"type": "function", "function": function})
    return tools


def _describe_source(described: Entry, language: str) -> None:
    """Say that a value is to be written as source text, in place."""
    kind = described["type"]
    text = f" This is {language} {kind} type parameter in string representation."
    if kind == "any":
        text = f" This parameter can be of any type of {language} object in string representation."
    if kind in bfcl_check.NESTED and "items" in described:
        item = described.pop("items")["type"]
        text += f" The list elements are of type {item}; they are not in string representation."
    if language == "JavaScript" and kind == "dict" and "properties" in described:
        schema = json.dumps(described.pop("properties"))
        text += (
            " The dictionary entries have the following schema; they are not in string"
            f" representation. {schema}"
        )
    described["description"] += text
    described["type"] = "string"


def _to_openai(properties: Entry) -> Entry:
    """Types as JSON Schema names them."""
    for described in properties.values():
        kind = described.get("type", "string")
        described["type"] = OPENAI_TYPES.get(kind, "string")
        if kind == "float":
            described["format"] = "float"
            described["description"] = (
                f"{described.get('description', '')} This is a float type value."
            )
        if described["type"] not in ("array", "object"):
            continue
        if "properties" in described:
            _to_openai(described["properties"])
        elif "items" in described:
            _rename_items(described["items"])
    return properties


def _rename_items(items: Entry) -> None:
    items["type"] = OPENAI_TYPES.get(items.get("type", "string"), "string")
    if items["type"] == "array" and "items" in items:
        items["items"]["type"] = OPENAI_TYPES.get(items["items"]["type"], "string")
    elif items["type"] == "object" and "properties" in items:
        _to_openai(items["properties"])


def _category(id_: str) -> str:
    return id_.rsplit("_", 1)[0]


def _read_answers(path: Path, entries: Sequence[Entry]) -> list[Any]:
    answers = read_entries(path)
    if len(answers) != len(entries):
        raise ConfigError(f"{path} has {len(answers)} answers for {len(entries)} questions")
    missing = [one["id"] for one in answers if "ground_truth" not in one]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} has no 'ground_truth'")
    return [one["ground_truth"] for one in answers]  # in the order of the questions


def _add_functions(folder: Path, entries: Sequence[Entry]) -> list[Path]:
    """Describe the functions of each conversation's services, in place; the files they are in."""
    table, described, paths = bfcl_turns.load_services(), {}, []
    for name in sorted({one for entry in entries for one in entry["involved_classes"]}):
        if name not in table.MULTI_TURN_FUNC_DOC_FILE_MAPPING:
            raise ConfigError(f"bfcl-eval has no service {name!r}")
        path = folder / "multi_turn_func_doc" / table.MULTI_TURN_FUNC_DOC_FILE_MAPPING[name]
        described[name] = [record.fields for record in read_records(path, ("name",))]
        paths.append(path)
    for entry in entries:
        functions = [one for name in entry["involved_classes"] for one in described[name]]
        held = {turn: set(names) for turn, names in entry.get("missed_function", {}).items()}
        entry["missed_function"] = {
            turn: [one for one in functions if one["name"] in names] for turn, names in held.items()
        }
        hidden = {name for names in held.values() for name in names}
        entry["function"] = [one for one in functions if one["name"] not in hidden]
    return paths
