"""Conversations as the OpenAI API spells them: checked, and brought to one form.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": TEXT}`. The content may
be a list of `{"type": "text", "text": TEXT}`. Any message may have a `name`. Assistants may have
`reasoning_content` (or `reasoning`), `weight` (0: the turn is not learned) and `tool_calls`,
`{"id", "type": "function", "function": {"name", "arguments"}}` with arguments as a JSON text or an
object; tools have a `tool_call_id`; a system's may have `tools`. The older `function_call` and role
"function" are brought to this form. A tool is
`{"type": "function", "function": {"name", "description", "parameters"}}`. A member that is null
counts as absent; any other key is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.config import ConfigError, nearest

ROLES = ("system", "user", "assistant", "tool")
OLD_RESULT = "function"  # the role of results before there were ids
KEYS = (
    "role",
    "content",
    "name",
    "reasoning_content",
    "reasoning",
    "weight",
    "tool_calls",
    "tool_call_id",
    "tools",
    "function_call",
)
# What only one role says.
ONLY = {
    "reasoning_content": "assistant",
    "weight": "assistant",
    "tool_calls": "assistant",
    "tool_call_id": "tool",
    "tools": "system",
}
CALL_KEYS = ("id", "type", "function", "index")
FUNCTION_KEYS = ("name", "arguments")
PART_KEYS = ("type", "text")

Message = dict[str, Any]


def check_messages(messages: Any) -> list[Message]:
    """The messages with every content a text, "" where there was none.

    Raises:
        ConfigError: a message is malformed, has a key that nobody reads or an image, or a result
            belongs to no call; one line says which and how.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ConfigError("messages must be a list of objects with 'role' and 'content'")
    out = [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    _tie_old_results(out)
    _check_references(out)
    return out


def _check_message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ConfigError(f"{name} must be an object with a 'role'")
    fields = _drop_nulls(message, KEYS, name)
    role = fields["role"]
    if role not in (*ROLES, OLD_RESULT):
        raise ConfigError(f"{name} has the role {role!r}; {nearest(role, ROLES)}")
    fields["content"] = _join_content(fields.get("content"), name)
    _move_old_keys(fields, name)
    for key in ("name", "reasoning_content", "tool_call_id"):
        if not isinstance(fields.get(key, ""), str):
            raise ConfigError(f"{name}.{key} must be a text")
    if role == "tool" and "tool_call_id" not in fields:
        raise ConfigError(f"{name} is a tool's result and needs the 'tool_call_id' of its call")
    if fields.get("weight", 1) not in (0, 1):
        raise ConfigError(f"{name}.weight is {fields['weight']!r}; it must be 0 or 1")
    if "tools" in fields:
        fields["tools"] = check_tools(fields["tools"], f"{name}.tools")
    _check_calls(fields, name)
    return fields


def _drop_nulls(fields: Mapping[str, Any], known: Sequence[str], name: str) -> dict[str, Any]:
    """The members that say something.

    Raises:
        ConfigError: one of them is not among the `known`.
    """
    for key, value in fields.items():
        if value is not None and key not in known:
            raise ConfigError(f"{name} has the key {key!r}; {nearest(str(key), known)}")
    return {key: value for key, value in fields.items() if value is not None}


def _move_old_keys(fields: Message, name: str) -> None:
    """Spell `reasoning` and `function_call` as the other messages do."""
    if "reasoning" in fields:
        thought = fields.pop("reasoning")
        if fields.setdefault("reasoning_content", thought) != thought:
            raise ConfigError(f"{name} has 'reasoning' and another 'reasoning_content'")
    if "function_call" in fields:
        if fields.get("tool_calls"):
            raise ConfigError(f"{name} has a 'function_call' beside 'tool_calls'")
        fields["tool_calls"] = [{"id": "", "function": fields.pop("function_call")}]
    if fields.get("tool_calls") == []:
        del fields["tool_calls"]
    for key, role in ONLY.items():
        if fields.get(key) not in (None, "") and fields["role"] != role:
            article = "an" if role == "assistant" else "a"
            raise ConfigError(f"{name} has {key}; only {article} {role}'s message has that")


def _check_calls(fields: Message, name: str) -> None:
    """Bring a message's calls to one form, in place."""
    if "tool_calls" not in fields:
        return
    calls = fields["tool_calls"]
    if not isinstance(calls, list):
        raise ConfigError(f"{name}.tool_calls must be a list")
    fields["tool_calls"] = [
        _check_call(call, i, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)
    ]


def _check_call(call: Any, place: int, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(call.get("id"), str):
        raise ConfigError(f"{name} must have an 'id' and a 'function'")
    call = {"type": "function", **_drop_nulls(call, CALL_KEYS, name)}
    if call["type"] != "function":
        raise ConfigError(f"{name} has the type {call['type']!r}; it must be 'function'")
    if call.pop("index", place) != place:
        raise ConfigError(f"{name}.index is not {place}, its place in the list")
    function = _drop_nulls(function, FUNCTION_KEYS, f"{name}.function")
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise ConfigError(f"{name}.function needs a 'name'")
    if not isinstance(function.get("arguments"), str | Mapping):
        raise ConfigError(f"{name}.function.arguments must be a JSON text or an object")
    return {**call, "function": function}


def _join_content(content: Any, name: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ConfigError(f"{name}.content must be a text or a list of text parts")
    return "".join([_part_text(part, f"{name}.content[{i}]") for i, part in enumerate(content)])


def _part_text(part: Any, name: str) -> str:
    fields = part if isinstance(part, Mapping) else {}
    kind = fields.get("type") or ("text" if isinstance(fields.get("text"), str) else None)
    if kind != "text" or not isinstance(fields.get("text"), str):
        shown = kind if isinstance(part, Mapping) else part
        raise ConfigError(f"{name} is {shown!r}; k2jax reads parts of type 'text' only")
    return _drop_nulls(fields, PART_KEYS, name)["text"]


def _tie_old_results(turns: Sequence[Message]) -> None:
    """Give calls and results without ids the ids that tie them: a name and a running number."""
    waiting: dict[str, list[str]] = {}
    count = 0
    for i, turn in enumerate(turns):
        for call in turn.get("tool_calls", ()):
            if not call["id"]:
                call["id"] = f"functions.{call['function']['name']}:{count}"
                waiting.setdefault(call["function"]["name"], []).append(call["id"])
            count += 1
        if turn["role"] == OLD_RESULT:
            ids = waiting.get(turn.get("name", ""))
            if not ids:
                raise ConfigError(f"messages[{i}] is a function's result and no call precedes it")
            turn |= {"role": "tool", "tool_call_id": ids.pop(0)}


def _check_references(turns: Sequence[Message]) -> None:
    """See that ids are unique in a turn, and that each result belongs to one call before it."""
    open_calls: dict[str, bool] = {}  # whether the latest call of that id has its result
    for i, turn in enumerate(turns):
        ids = [call["id"] for call in turn.get("tool_calls", ())]
        if len(set(ids)) < len(ids):
            twice = next(id_ for id_ in ids if ids.count(id_) > 1)
            raise ConfigError(f"messages[{i}] has two tool calls with the id {twice!r}")
        open_calls |= dict.fromkeys(ids, True)
        if turn["role"] != "tool":
            continue
        id_ = turn["tool_call_id"]
        if not open_calls.get(id_):
            why = "has a result already" if id_ in open_calls else "is no call's before it"
            raise ConfigError(f"messages[{i}] is the result of {id_!r}, which {why}")
        open_calls[id_] = False


def check_tools(tools: Any, name: str = "tools") -> list[dict[str, Any]]:
    """The tools; they are functions where they do not say what.

    Args:
        tools: to check.
        name: of the field, for messages.

    Raises:
        ConfigError: a tool is malformed; one line says which.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ConfigError(f"{name} must be a list of objects with 'type' and 'function'")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ConfigError(f"{name}[{i}] needs a 'function' with a 'name'")
    return [{"type": "function", **tool} for tool in tools]


def renumber_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls named as the model names them: `functions.NAME:INDEX`.

    The index counts all calls of the conversation from 0. Servers that give calls ids of their own
    break conversations of several turns [K2VV; spec 5.3, trap 20]. Nothing changes where every id
    has that form already. An id that comes again in a later turn names the later call from there.

    Args:
        messages: from `check_messages`.
    """
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    numbered = [f"functions.{call['function']['name']}:{i}" for i, call in enumerate(calls)]
    if [call["id"] for call in calls] == numbered:
        return list(messages)
    ids = iter(numbered)
    renamed: dict[str, str] = {}
    out: list[Message] = []
    for message in messages:
        new = dict(message)
        if message.get("tool_calls"):
            new["tool_calls"] = [{**call, "id": next(ids)} for call in message["tool_calls"]]
            pairs = zip(message["tool_calls"], new["tool_calls"], strict=True)
            renamed |= {call["id"]: named["id"] for call, named in pairs}
        if message["role"] == "tool":
            new["tool_call_id"] = renamed[message["tool_call_id"]]
        out.append(new)
    return out


def function_name(id_: str) -> str:
    """The function of a call by its id, `functions.NAME:INDEX`.

    Names may have dots, hyphens and colons; models leave out the prefix or the index now and then.
    """
    id_ = id_.strip()
    head, colon, index = id_.rpartition(":")
    name = head if colon and index.strip().isascii() and index.strip().isdigit() else id_
    return name.removeprefix("functions.").strip()
