"""From what a request says of tools and format to the constraint of one sequence."""

from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.config import ConfigError, nearest
from k2jax.constrain.answer import Answer, Rules, Tool
from k2jax.constrain.json_schema import close_objects, compile_schema, prepare_arguments
from k2jax.constrain.vocabulary import Vocabulary, open_vocabulary
from k2jax.text import kimi_template as marks
from k2jax.text.interface import TokenizerLike
from k2jax.text.messages import check_tools

CHOICES = ("none", "auto", "required")
FORMATS = ("text", "json_object", "json_schema")
TAIL = 16  # tokens of a prompt that are looked at for an open thought
SECTION = (marks.CALLS, marks.END_CALLS, marks.CALL, marks.END_CALL, marks.ARGUMENTS)


def make_constraint(  # noqa: PLR0913
    tokenizer: TokenizerLike,
    *,
    tools: Sequence[Mapping[str, Any]] | None = (),
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel: bool = True,
    response_format: Mapping[str, Any] | None = None,
    thinking: bool = False,
    prompt: Sequence[int] = (),
    first_index: int = 0,
) -> Answer | None:
    """Make the constraint of one sequence.

    Arguments of calls always match their tool's schema, and JSON its format's; with a number of new
    tokens that `start` accepts the answer is complete before they run out. Objects that list their
    properties and do not say that they are open get no other members.

    Args:
        tokenizer: of the model; calls need Kimi's control tokens in it.
        tools: what may be called, as OpenAI's API has it.
        tool_choice: "none", "auto", "required" or `{"type": "function", "function": {"name"}}`,
            which is one call; None: "auto" if there are tools.
        parallel: whether a section may have several calls.
        response_format: `{"type": "text" | "json_object" | "json_schema", ...}`.
        thinking: the model may think first, in marks of its own. A thought that the prompt leaves
            open is seen there.
        prompt: ids that the model reads before.
        first_index: of the first call: how many calls the conversation has.

    Returns:
        None where nothing is constrained.

    Raises:
        ConfigError: a field is wrong, or a schema cannot be compiled; one line says which and how.
    """
    listed = check_tools(tools or ())
    mode, name = _read_choice(tool_choice, listed)
    schema = _read_format(response_format)
    if schema is None and not listed:
        return None
    words = open_vocabulary(tokenizer)
    callable_ = [] if mode == "none" else _compile_tools(listed, name, words)
    content = None if schema is None else compile_schema(schema, words, "response_format")
    if not callable_ and content is None and not _has_marks(words):
        return None
    rules = Rules(
        words=words,
        tools=callable_,
        must_call=mode == "required",
        many=parallel and name is None,
        content=content,
        thinks=_describe_thought(tokenizer, prompt, thinking),
    )
    return Answer(rules, first_index)


def _read_choice(
    choice: str | Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]]
) -> tuple[str, str | None]:
    """One of CHOICES, and the only function that may be called."""
    if choice is None:
        choice = "auto" if tools else "none"
    if isinstance(choice, str):
        if choice not in CHOICES:
            raise ConfigError(f"tool_choice is {choice!r}; {nearest(choice, CHOICES)}")
        if choice == "required" and not tools:
            raise ConfigError("tool_choice is 'required' and there are no tools")
        return choice, None
    function = choice.get("function") if isinstance(choice, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(
            "tool_choice must be 'none', 'auto', 'required' or an object with a function's name"
        )
    name, names = function["name"], [tool["function"]["name"] for tool in tools]
    if name not in names:
        raise ConfigError(f"tool_choice names {name!r}; {nearest(name, names)}")
    return "required", name


def _compile_tools(
    tools: Sequence[Mapping[str, Any]], only: str | None, words: Vocabulary
) -> list[Tool]:
    if not tools:
        return []
    if not _has_marks(words):
        missing = next(part.text for part in SECTION if part.text not in words.specials)
        raise ConfigError(f"calls need a tokenizer with {missing!r}, which this one lacks")
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"two tools are called {twice!r}")
    out = []
    for i, tool in enumerate(tools):
        function, where = tool["function"], f"tools[{i}].function {names[i]!r}"
        if only not in (None, names[i]):
            continue
        if not names[i].strip() or any(ord(c) < 0x20 for c in names[i]):
            raise ConfigError(f"tools[{i}].function.name must be a text without control characters")
        schema = prepare_arguments(function.get("parameters"), where)
        out.append(Tool(names[i], compile_schema(schema, words, where)))
    return out


def _has_marks(words: Vocabulary) -> bool:
    return all(part.text in words.specials for part in SECTION)


def _read_format(response_format: Mapping[str, Any] | None) -> Any:
    """The schema of the answer; None: any text."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in FORMATS:
        raise ConfigError(f"response_format.type is {kind!r}; {nearest(str(kind), FORMATS)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = response_format.get("json_schema")
    if not isinstance(described, Mapping) or "schema" not in described:
        raise ConfigError("response_format.json_schema must be an object with a 'schema'")
    return close_objects(described["schema"])


def _describe_thought(tokenizer: TokenizerLike, prompt: Sequence[int], thinking: bool) -> str:
    if tokenizer.decode(prompt[-TAIL:]).rstrip().endswith(marks.THINK.text):
        return "open"
    return "may" if thinking else "no"
