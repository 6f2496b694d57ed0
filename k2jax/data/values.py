"""What a record is: a text or a conversation, by the same rules whatever file it is in."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from k2jax.config import ConfigError

FIELD = "text"
_NOUNS = {
    str: "a text",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    bytes: "bytes",
}


class Chat(NamedTuple):
    """A conversation, as `k2jax.text.messages` describes it."""

    messages: Any
    tools: Any


Value = str | Chat


def to_value(record: Any, field: str, where: str) -> Value:
    """The text or the conversation of a record; "" where its text is null.

    Args:
        record: a JSON object, or a row of a table.
        field: name of the text.
        where: for messages.

    Raises:
        ConfigError: it has neither, one of the wrong type, or `field` and a conversation.
    """
    if not isinstance(record, Mapping):
        raise ConfigError(f'{where} has no field "{field}" or "messages"; it is {noun(record)}')
    messages, text = record.get("messages"), record.get(field)
    if messages is not None and not isinstance(messages, list):
        raise ConfigError(
            f'{where}: "messages" is {noun(messages)}; it must be a list of objects with "role"'
            ' and "content"'
        )
    if messages:
        if field != FIELD:
            raise ConfigError(
                f'{where} has "messages", beside which --field {field} has no effect; leave out'
                " the one or the other"
            )
        tools = record.get("tools")
        return Chat(messages, [] if tools is None else tools)
    if isinstance(text, str):
        return text
    if text is not None:
        raise ConfigError(f'{where}: "{field}" is {noun(text)}, not a text')
    if field not in record and "messages" not in record:
        names = ", ".join(map(str, record)) or "nothing"
        raise ConfigError(f'{where} has no field "{field}" or "messages"; it has: {names}')
    return ""


def is_record(record: Any, field: str) -> bool:
    """Whether a JSON value has a text or a conversation."""
    return isinstance(record, Mapping) and (field in record or "messages" in record)


def noun(value: Any) -> str:
    """What a value is, for messages."""
    if value is None or isinstance(value, Mapping):
        return "null" if value is None else "an object"
    return _NOUNS.get(type(value), f"a {type(value).__name__}")
