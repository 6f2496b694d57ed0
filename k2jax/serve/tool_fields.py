"""Tools of a request, and which of them must be called."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from k2jax.serve.body import Body
from k2jax.serve.refusal import Refusal

NAME = re.compile(r"\S{1,256}\Z")
CHOICES = ("none", "auto", "required")
Tool = Mapping[str, Any]


def check_declared(tools: Sequence[Tool], messages: Iterable[Mapping[str, Any]]) -> list[Tool]:
    """All tools of a request, those of its messages too.

    Raises:
        Refusal: one is no function, its name cannot be written, or two have one name.
    """
    places = [(f"tools[{i}]", tool) for i, tool in enumerate(tools)]
    for i, message in enumerate(messages):
        listed = message.get("tools") or ()
        places += [(f"messages[{i}].tools[{j}]", tool) for j, tool in enumerate(listed)]
    seen: set[str] = set()
    for place, tool in places:
        function, name = tool["function"], tool["function"]["name"]
        if tool["type"] != "function":
            raise Refusal(f"{place}.type is {tool['type']!r}; it must be 'function'", place)
        if not NAME.match(name):
            field = f"{place}.function.name"
            raise Refusal(f"{field} must have 1 to 256 characters and no white space", field)
        if name in seen:
            raise Refusal(f"{place}: {name!r} is declared twice", f"{place}.function.name")
        if not isinstance(function.get("parameters") or {}, Mapping):
            field = f"{place}.function.parameters"
            raise Refusal(f"{field} must be a JSON schema, an object", field)
        seen.add(name)
    return [tool for _, tool in places]


def read_choice(body: Body, tools: Sequence[Tool]) -> str | dict[str, Any]:
    """Which tool must be called: "none", "auto", "required", or an object that names one.

    Raises:
        Refusal: the field is malformed, or asks for a call where there is no such tool.
    """
    choice = body.value("tool_choice")
    if choice is None:
        return "auto" if tools else "none"
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, str):
        if choice not in CHOICES:
            body.refuse("tool_choice", f"is {choice!r}; it must be none, auto, required or a tool")
        if choice == "required" and not tools:
            body.refuse("tool_choice", "is 'required' and there are no tools")
        return choice if tools else "none"
    function = choice.get("function") if isinstance(choice, Mapping) else None
    if not isinstance(function, Mapping) or choice.get("type") != "function":
        body.refuse("tool_choice", "must be a text or {'type': 'function', 'function': {'name'}}")
    if function.get("name") not in names:
        body.refuse("tool_choice", f"names {function.get('name')!r}, which is not among the tools")
    return {"type": "function", "function": {"name": function["name"]}}


def read_format(body: Body) -> dict[str, Any] | None:
    """The form of the content; None: text.

    Raises:
        Refusal: the field is malformed.
    """
    form = body.mapping("response_format")
    if not form:
        if "response_format" in body:
            body.refuse("response_format", "needs a 'type'")
        return None
    kind = form.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        body.refuse(
            "response_format", f"has the type {kind!r}; there are: text, json_object, json_schema"
        )
    if kind == "json_schema":
        inner = form.get("json_schema")
        if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping | bool):
            body.refuse("response_format", "needs a 'json_schema' with a 'schema'")
    return None if kind == "text" else dict(form)
