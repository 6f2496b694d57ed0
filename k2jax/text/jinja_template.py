"""A published folder's own chat template.

Templates are Jinja, rendered in jinja2's sandbox: no code of the folder is run otherwise.
"""

import datetime
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from k2jax.config import ConfigError, one_line
from k2jax.text import hf_tokenizer as hf
from k2jax.text import typescript
from k2jax.text.interface import NOTHING, Part
from k2jax.text.kimi_template import SPELLED_OUT
from k2jax.text.messages import Message, check_messages, check_tools

TEMPLATE = "chat_template.jinja"
# Where a template asks for this, published code gives it the tools as TypeScript (K2.5 and later).
TYPESCRIPT = "tools_ts_str"
RESERVED = ("messages", "tools", "add_generation_prompt", "documents", TYPESCRIPT)
# How templates read the tools of a message.
MESSAGE_TOOLS = re.compile(r"""\w\.(get\(\s*['"])?tools\b|\w\[\s*['"]tools['"]\s*\]""")
PRIVATE = range(0xE000, 0xF8FF)  # characters that mean nothing


class FolderTemplate:
    """A folder's own template.

    Attributes:
        variables: what it is given besides messages and tools; `thinking`, where it asks for that.
    """

    def __init__(self, sources: Mapping[str, str], specials: Iterable[str], name: str):
        """Compile it.

        Args:
            sources: "default", and maybe "tool_use", which is taken where there are tools.
            specials: names of control tokens.
            name: of the file, for messages.

        Raises:
            ConfigError: it is no Jinja template.
        """
        import jinja2

        self.variables: dict[str, Any] = {}
        self._name, self._sources = name, sources
        self._control = _match_any(specials)
        # Templates look for the marks around a thought in what an assistant said.
        self._unthought = _match_any(set(specials) - set(SPELLED_OUT))
        environment = _make_environment()
        try:
            self._compiled = {kind: environment.from_string(s) for kind, s in sources.items()}
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise ConfigError(
                f"{name} is no template that jinja2 reads: {one_line(error)}"
            ) from None

    @property
    def source(self) -> str:
        """Its text."""
        return self._sources["default"]

    @property
    def thinks(self) -> bool:
        """Whether it knows of thoughts."""
        return any(SPELLED_OUT[1] in source for source in self._sources.values())

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], specials: Iterable[str]
    ) -> "FolderTemplate | None":
        """The template in `chat_template.jinja` or `tokenizer_config.json`; None: neither has one.

        Raises:
            ConfigError: a file is malformed; one line says which.
        """
        file, config = Path(folder, TEMPLATE), Path(folder, hf.CONFIG)
        fields = hf.read_json(config) if config.is_file() else {}
        source: Any = hf.read_text(file) if file.is_file() else fields.get("chat_template")
        name = str(file if file.is_file() else config)
        if isinstance(source, list):
            named = [item for item in source if isinstance(item, dict)]
            source = {item.get("name"): item.get("template") for item in named}
        sources = {"default": source} if isinstance(source, str) else source
        if not sources:
            return None
        texts = isinstance(sources, dict) and all(isinstance(s, str) for s in sources.values())
        if not texts or "default" not in sources:
            raise ConfigError(f"{name}: chat_template must be a text, or have one named 'default'")
        template = cls(sources, specials, name)
        template.variables |= {
            key: value.get("content", "") if isinstance(value, dict) else value
            for key, value in fields.items()
            if key.endswith("_token") and value is not None
        }
        return template

    def parts(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: bool = True,
        variables: Mapping[str, Any] = NOTHING,
    ) -> list[Part]:
        """The conversation, piece by piece; what messages and tools say is ordinary text.

        Args:
            messages: see `k2jax.text.messages`.
            tools: declared as the template does it.
            prompt: open the assistant's turn at the end.
            variables: that the template reads besides, such as `thinking`.

        Raises:
            ConfigError: a message or a tool is malformed, or the template cannot say it.
        """
        turns, declared = check_messages(messages), check_tools(tools)
        kind = "tool_use" if declared and "tool_use" in self._compiled else "default"
        self._check(kind, turns, declared, variables)
        everything = json.dumps([turns, declared, dict(variables)], ensure_ascii=False)
        joint, trace = _pick_unused(everything + self._sources[kind])
        variables = {**self.variables, **_guard_names(variables, self._control, joint)}
        variables |= {"add_generation_prompt": prompt, "documents": None}
        if TYPESCRIPT in self._sources[kind]:
            declared = typescript.sort_keys(declared)
            if (namespace := typescript.declare_tools(declared)) is not None:
                variables[TYPESCRIPT] = _guard_names(namespace, self._control, joint)
        variables["tools"] = _guard_names(declared, self._control, joint) or None
        calls = sum(len(turn.get("tool_calls") or []) for turn in turns)
        for nothing in ("", None):  # DeepSeek's first template has calls only where content is none
            guarded = [self._guard(turn, joint, trace, nothing) for turn in turns]
            text = self._render(kind, {**variables, "messages": guarded})
            marked = text.count(trace) + text.count(f"\\u{ord(trace):04x}")
            if marked == calls:
                break
        else:
            raise ConfigError(f"{self._name} leaves out tool calls of this conversation")
        pieces = self._control.split(text)
        marks = "|".join([joint, trace, *(rf"\\u{ord(char):04x}" for char in (joint, trace))])
        return [
            Part(re.sub(marks, "", piece), i % 2 == 1) for i, piece in enumerate(pieces) if piece
        ]

    def _check(
        self,
        kind: str,
        turns: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
    ) -> None:
        """Refuse what the template would leave out."""
        source = self._sources[kind]
        called = any(turn.get("tool_calls") or turn["role"] == "tool" for turn in turns)
        for word, needed in (("tools", bool(tools)), ("tool_calls", called)):
            if needed and word not in source:
                raise ConfigError(f"{self._name} leaves out {word}; this model cannot be told them")
        for i, turn in enumerate(turns):
            if turn.get("tools") and not MESSAGE_TOOLS.search(source):
                raise ConfigError(
                    f"messages[{i}].tools: {self._name} reads no tools of a message; give them in"
                    " 'tools'"
                )
        if taken := [name for name in variables if name in RESERVED]:
            raise ConfigError(f"the template's variable {taken[0]!r} cannot be set")

    def _guard(self, turn: Message, joint: str, trace: str, nothing: str | None) -> Message:
        """A message without names of control tokens, `trace` at the end of each call's arguments.

        Args:
            turn: from `check_messages`.
            joint: breaks the names up.
            trace: shows whether the template writes a call.
            nothing: the content of an assistant that only calls.
        """
        guarded = _guard_names(turn, self._control, joint)
        if turn["role"] == "assistant":
            guarded["content"] = _guard_names(turn["content"], self._unthought, joint)
        for call in guarded.get("tool_calls") or []:
            arguments = call["function"]["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            call["function"]["arguments"] = arguments + trace
            guarded["content"] = guarded["content"] or nothing
        return guarded

    def _render(self, kind: str, variables: Mapping[str, Any]) -> str:
        try:
            return str(self._compiled[kind].render(**variables))
        except Exception as error:  # whatever a foreign template raises is its answer
            raise ConfigError(
                f"{self._name} cannot say this conversation: {one_line(error)}"
            ) from None


def _guard_names(value: Any, names: re.Pattern[str], joint: str) -> Any:
    """`value` with `joint` inside every name of a control token, so that none is left."""
    if isinstance(value, str):
        return names.sub(lambda match: match[0][:1] + joint + match[0][1:], value)
    if isinstance(value, Mapping):
        each = value.items()
        return {_guard_names(k, names, joint): _guard_names(v, names, joint) for k, v in each}
    if isinstance(value, list | tuple):
        return [_guard_names(item, names, joint) for item in value]
    return value


def _match_any(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def _pick_unused(text: str) -> tuple[str, str]:
    """Two characters of no meaning that the text does not have."""
    free = (chr(code) for code in PRIVATE if chr(code) not in text)
    return next(free), next(free)


def _make_environment() -> Any:
    """Jinja as templates of published models expect it."""
    from jinja2 import TemplateError, sandbox

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _make_generation_tag()],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _make_generation_tag() -> Any:
    """`{% generation %}...{% endgeneration %}`, around what a model is to learn; prints nothing."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = frozenset({"generation"})  # type: ignore[assignment]  # nothing adds to it

        def parse(self, parser: Any) -> Any:
            """The tag's body; what is set in it stays in it, as in transformers."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; jinja2's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
