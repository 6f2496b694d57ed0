"""Requests that are refused, in the form in which the OpenAI API reports errors."""

import re
from typing import Any

INVALID = "invalid_request_error"
# Messages of other rooms begin with the field they are about: "messages[0].content ...".
FIELD = re.compile(r"(messages|tools|tool_choice|response_format|max_tokens)\b[\w.\[\]$]*")


class Refusal(Exception):
    """A request that is not answered; the message says what to change.

    Attributes:
        status: of HTTP.
        param: the field at fault.
        code: a word for programs.
        kind: the `type` of the error.
        headers: of the response.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        return {
            "error": {
                "message": str(self),
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def from_mistake(message: str, param: str | None = None) -> Refusal:
    """A user's mistake that another room reports; `param` where it does not begin with a field."""
    field = FIELD.match(message)
    return Refusal(message, field[0].rstrip(".") if field else param)


def too_busy(message: str, status: int = 429) -> Refusal:
    """The same request may succeed later."""
    kind, code = ("rate_limit_error", "rate_limit_exceeded")
    if status == 503:
        kind, code = ("server_error", "unavailable")
    return Refusal(message, status=status, code=code, kind=kind, headers={"retry-after": "1"})


def internal_error(message: str = "the server failed to answer this request") -> Refusal:
    """No mistake of the client."""
    return Refusal(message, status=500, code="internal_error", kind="server_error")
