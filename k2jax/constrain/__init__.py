"""Which tokens may come next: answers that cannot break their tools' or their format's schema.

`make_constraint` takes what an OpenAI request says about tools and format, and returns the object
that the engine asks for a mask before each token. Calls are written in Kimi's section grammar, JSON
is constrained by `llguidance` (extra `serve`), and both are closed before the tokens run out.

Modules: `build` (a request's fields) | `answer` (thought, text, sections of calls) | `literal` (one
of a few texts) | `json_value` (a JSON value, closed in time) | `json_schema` (schemas, compiled) |
`shortest` (how a value can be closed) | `position` (where in its text) | `bounds` (how long it may
take) | `vocabulary` (the tokens).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2jax.constrain.build import make_constraint

__all__ = ["make_constraint"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from k2jax.constrain import build

        return getattr(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
