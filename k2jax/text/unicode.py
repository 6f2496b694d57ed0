"""Text at the edges: halves of surrogate pairs, which are no characters, become U+FFFD."""

from typing import Any


def replace_surrogates(text: str) -> str:
    """`text` with half surrogate pairs replaced, and whole ones joined.

    Valid JSON may hold half a pair, and Python passes bytes of the command line that are no UTF-8
    as such halves; neither can be encoded.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def replace_surrogates_in(value: Any) -> Any:
    """A JSON value with `replace_surrogates` applied to each of its texts, keys included."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, dict):
        each = value.items()
        return {replace_surrogates_in(key): replace_surrogates_in(item) for key, item in each}
    return [replace_surrogates_in(item) for item in value] if isinstance(value, list) else value
