"""Conversations as the OpenAI API spells them: checked, and brought to one form.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": TEXT}`. The content may
be a list of `{"type": "text", "text": TEXT}`. Assistants may have `reasoning_content` and
`tool_calls`, `{"id", "type": "function", "function": {"name", "arguments"}}` with arguments as a
JSON text or an object; tools have a `tool_call_id`. A tool is
`{"type": "function", "function": {"name", "description", "parameters"}}`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.config import ConfigError, nearest

ROLES = ("system", "user", "assistant", "tool")
ID = re.compile(r"functions\..+:\d+")  # how the family calls a call

Message = dict[str, Any]


def checked(messages: Any) -> list[Message]:
    """The messages with every content a text, "" where there was none.

    Raises:
        ConfigError: a message is malformed, or has an image; one line says which and how.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ConfigError("messages must be a list of objects with 'role' and 'content'")
    return [_checked(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ConfigError(f"{name} must be an object with a 'role'")
    role = message["role"]
    if role not in ROLES:
        raise ConfigError(f"{name} has the role {role!r}; {nearest(role, ROLES)}")
    found = {**message, "content": _text(message.get("content"), name)}
    for key in ("name", "reasoning_content"):
        if not isinstance(found.get(key) or "", str):
            raise ConfigError(f"{name}.{key} must be a text")
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise ConfigError(f"{name} is a tool's result and needs the 'tool_call_id' of its call")
    if calls := _calls(message, name):
        found["tool_calls"] = calls
    return found


def _calls(message: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or []
    if calls and message["role"] != "assistant":
        raise ConfigError(f"{name} has tool_calls; only an assistant calls tools")
    if not isinstance(calls, list):
        raise ConfigError(f"{name}.tool_calls must be a list")
    for i, call in enumerate(calls):
        _check_call(call, f"{name}.tool_calls[{i}]")
    return [{"type": "function", **call} for call in calls]


def _text(content: Any, name: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ConfigError(f"{name}.content must be a text or a list of text parts")
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise ConfigError(
                f"{name}.content[{i}] is {kind!r}; k2jax reads parts of type 'text' only"
            )
    return "".join(part["text"] for part in content)


def _check_call(call: Any, name: str) -> None:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(call.get("id"), str):
        raise ConfigError(f"{name} must have an 'id' and a 'function'")
    if not isinstance(function.get("name"), str):
        raise ConfigError(f"{name}.function needs a 'name'")
    if not isinstance(function.get("arguments"), str | Mapping):
        raise ConfigError(f"{name}.function.arguments must be a JSON text or an object")


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools; they are functions where they do not say what.

    Raises:
        ConfigError: a tool is malformed; one line says which.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ConfigError("tools must be a list of objects with 'type' and 'function'")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ConfigError(f"tools[{i}] needs a 'function' with a 'name'")
    return [{"type": "function", **tool} for tool in tools]


def renumbered(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls named as the model names them: `functions.NAME:INDEX`.

    The index counts all calls of the conversation from 0. Servers that give calls ids of their own
    break conversations of several turns [K2VV; spec 5.3, trap 20]. Nothing changes where every id
    has that form already.

    Args:
        messages: from `checked`.
    """
    ids = [call["id"] for message in messages for call in message.get("tool_calls") or []]
    if all(ID.fullmatch(id_) for id_ in ids):
        return list(messages)
    renamed: dict[str, str] = {}
    out: list[Message] = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or []:
            id_ = f"functions.{call['function']['name']}:{len(renamed)}"
            renamed[call["id"]] = id_
            calls.append({**call, "id": id_})
        new = {**message, "tool_calls": calls} if calls else message
        if message["role"] == "tool":
            answered = message["tool_call_id"]
            new = {**message, "tool_call_id": renamed.get(answered, answered)}
        out.append(new)
    return out
