"""Conversations as Kimi models read them.

A turn is a role token, a name, `<|im_middle|>`, the body, `<|im_end|>`: no [BOS], no white space
between turns. What comes from messages and tools is ordinary text whatever it looks like: it never
becomes a control token. Source: [TPL-K2T], [TPL-FORK] (spec 5.2).
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k2jax.config import ConfigError
from k2jax.text.interface import NOTHING, Part, TokenizerLike
from k2jax.text.messages import Message, check_messages, check_tools, renumber_calls

# Text in K2-Thinking, tokens in K2.5: what a tokenizer has no token for is written out.
THINK, END_THINK = Part("<think>", True), Part("</think>", True)
SPELLED_OUT = (THINK.text, END_THINK.text)

USER, ASSISTANT, SYSTEM = (Part(f"<|im_{role}|>", True) for role in ("user", "assistant", "system"))
MIDDLE, END = Part("<|im_middle|>", True), Part("<|im_end|>", True)
CALLS, END_CALLS = (Part(f"<|tool_calls_section_{edge}|>", True) for edge in ("begin", "end"))
CALL, END_CALL = (Part(f"<|tool_call_{edge}|>", True) for edge in ("begin", "end"))
ARGUMENTS = Part("<|tool_call_argument_begin|>", True)


@dataclasses.dataclass(frozen=True)
class KimiTemplate:
    """How one release writes a conversation.

    Attributes:
        system: said where the first message is no system message; "": nothing.
        separators: of the JSON list of tools.
        thinks: assistants' turns begin with what they thought. Only the turns after the last
            answer keep theirs: a running chain of tool calls.
    """

    system: str = "You are Kimi, an AI assistant created by Moonshot AI."
    separators: tuple[str, str] = (",", ":")
    thinks: bool = False

    def parts(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: bool = True,
        variables: Mapping[str, Any] = NOTHING,
    ) -> list[Part]:
        """The conversation, piece by piece.

        Args:
            messages: see `k2jax.text.messages`. Ids of calls are written as they are. Tools of a
                system message are declared before it, as all tools are before everything else
                (ours: no release that this template is of has them there).
            tools: declared before everything else.
            prompt: open the assistant's turn at the end.
            variables: of templates that think, `thinking`: False closes the thought of the turn
                that is opened (as K2.5 does); `preserve_thinking`: all turns keep theirs (as K2.6
                does). Others are read by no one.

        Raises:
            ConfigError: a message or a tool is malformed.
        """
        turns, declared = check_messages(messages), check_tools(tools)
        out: list[Part] = []
        out += self._declare(declared)
        if self.system and (not turns or turns[0]["role"] != "system"):
            out += [SYSTEM, _text("system"), MIDDLE, _text(self.system), END]
        last = max((i for i, turn in enumerate(turns) if _is_answer(turn)), default=-1)
        keep_all = bool(variables.get("preserve_thinking"))
        for i, turn in enumerate(turns):
            out += self._declare(turn.get("tools") or [])
            if turn["content"] or not turn.get("tools"):
                out += [*_head(turn), *self._body(turn, keep_all or i > last), END]
        if not prompt:
            return out
        closed = self.thinks and variables.get("thinking") is False
        return [
            *out,
            ASSISTANT,
            _text("assistant"),
            MIDDLE,
            *([THINK, END_THINK] if closed else []),
        ]

    def _declare(self, tools: Sequence[Mapping[str, Any]]) -> list[Part]:
        if not tools:
            return []
        listed = json.dumps(tools, ensure_ascii=False, separators=self.separators)
        return [SYSTEM, _text("tool_declare"), MIDDLE, _text(listed), END]

    def _body(self, turn: Message, running: bool) -> Iterator[Part]:
        if turn["role"] == "tool":
            yield _text(f"## Return of {turn['tool_call_id']}\n")
        if turn["role"] == "assistant" and self.thinks:
            yield THINK
            yield _text(turn.get("reasoning_content") or "" if running else "")
            yield END_THINK
        yield _text(turn["content"])
        calls = turn.get("tool_calls") or []
        if calls:
            yield CALLS
        for call in calls:
            arguments = call["function"]["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            yield from (CALL, _text(call["id"]), ARGUMENTS, _text(arguments), END_CALL)
        if calls:
            yield END_CALLS


KIMI_K2 = KimiTemplate()
# By release. The separators of single revisions differ: a folder's own template wins over these.
TEMPLATES = {
    "kimi_k2": KIMI_K2,
    "kimi_k2_0905": KIMI_K2,
    "kimi_k2_thinking": KimiTemplate(separators=(", ", ": "), thinks=True),
}


def encode(
    tokenizer: TokenizerLike,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    prompt: bool = True,
    variables: Mapping[str, Any] = NOTHING,
) -> list[int]:
    """Token ids of a conversation, by the tokenizer's template.

    Args:
        tokenizer: `tokenizer.template` says how; set it to one of TEMPLATES for another release.
        messages: see `k2jax.text.messages`. Calls whose ids are not the model's are renamed.
        tools: what the assistant may call.
        prompt: open the assistant's turn at the end, for it to answer.
        variables: of the template, such as `thinking`.

    Raises:
        ConfigError: there is no template, it lacks tokens, or a message is malformed.
    """
    if tokenizer.template is None:
        raise ConfigError("this model has no chat template; give prompts as plain text")
    turns = renumber_calls(check_messages(messages))
    return to_ids(tokenizer, tokenizer.template.parts(turns, tools, prompt, variables))


def to_ids(tokenizer: TokenizerLike, parts: Sequence[Part]) -> list[int]:
    """Token ids of a rendered conversation.

    Raises:
        ConfigError: the tokenizer has no such control token.
    """
    ids: list[int] = []
    pending = ""  # ordinary text is encoded whole between control tokens
    for part in parts:
        id_ = tokenizer.specials.get(part.text) if part.control else None
        if id_ is None:
            if part.control and part.text not in SPELLED_OUT:
                raise ConfigError(f"the tokenizer has no {part.text!r}, which this template needs")
            pending += part.text
            continue
        ids += [*(tokenizer.encode(pending) if pending else []), id_]
        pending = ""
    return ids + (tokenizer.encode(pending) if pending else [])


def to_text(parts: Sequence[Part]) -> str:
    """The rendered conversation, to look at; names of control tokens stand for them."""
    return "".join(part.text for part in parts)


def _text(text: str) -> Part:
    return Part(text, False)


def _head(turn: Message) -> tuple[Part, ...]:
    token = {"user": USER, "assistant": ASSISTANT}.get(turn["role"], SYSTEM)
    return token, _text(turn.get("name") or turn["role"]), MIDDLE


def _is_answer(turn: Message) -> bool:
    return turn["role"] == "assistant" and not turn.get("tool_calls")
