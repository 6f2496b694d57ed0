"""`/v1/chat/completions`: a conversation to answer."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.config import ConfigError
from k2jax.inference.request import TOP_LOGPROBS, Constraint, Request, derive_seed
from k2jax.serve import sampling_fields as shared
from k2jax.serve.ask import ChatAsk
from k2jax.serve.body import Body
from k2jax.serve.refusal import Refusal, from_mistake
from k2jax.serve.service import Service
from k2jax.serve.tool_fields import Tool, check_declared, read_choice, read_format
from k2jax.text.interface import TokenizerLike
from k2jax.text.kimi_template import to_ids
from k2jax.text.messages import Message, check_messages, check_tools, renumber_calls

FIELDS = (
    *shared.SHARED,
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "top_logprobs",
    "thinking",
    "preserve_thinking",
    "reasoning_effort",
    "chat_template_kwargs",
)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **shared.UNSUPPORTED,
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "documents": ([],),
}


def read_chat(content: Mapping[str, Any], service: Service) -> ChatAsk:
    """Read a request's body.

    Args:
        content: its JSON object.
        service: whose model answers.

    Raises:
        Refusal: a field is wrong.
    """
    body = Body(content, FIELDS, UNSUPPORTED)
    card = service.card
    card.check_name(body.value("model"))
    tokenizer = card.need_tokenizer()
    streaming = shared.read_streaming(body)
    messages, tools = read_conversation(body)
    variables = read_variables(body)
    prompt = write_prompt(tokenizer, messages, tools, variables)
    thinks = bool(tokenizer.template and tokenizer.template.thinks)
    thinks &= variables.get("thinking") is not False
    declared = check_declared(tools, messages)
    choice, form = read_choice(body, declared), read_format(body)
    ends = shared.read_ends(body, tokenizer.stops, card.vocab)
    room = card.context - len(prompt)
    length = shared.read_length(body, room, room, 1, "messages")
    sampling = shared.read_sampling(body, service.defaults.fix(thinks), card.vocab)
    top, scored = _read_logprobs(body), shared.read_prompt_logprobs(body, streaming)
    first_call = sum(len(message.get("tool_calls") or ()) for message in messages)
    parallel = body.flag("parallel_tool_calls", True)
    grammar = Grammar(tokenizer, prompt, thinks, declared, choice, form, parallel, first_call)
    requests = []
    for number in range(body.integer("n", 1, 1, shared.MOST_CHOICES)):
        constraint = grammar.make_constraint()
        if constraint is not None and body.flag("ignore_eos"):
            body.refuse("ignore_eos", "has no meaning with tools or a response_format")
        requests.append(
            Request(
                prompt,
                length,
                dataclasses.replace(sampling, seed=derive_seed(sampling.seed, number)),
                stop_ids=ends.ids,
                logprobs=top,
                prompt_logprobs=scored,
                constraint=constraint,
            )
        )
    return ChatAsk(
        tuple(requests),
        streaming,
        top,
        scored is not None,
        len(prompt),
        stop=ends.texts,
        calls=choice != "none",
        first_call=first_call,
        most_calls=1024 if parallel else 1,
    )


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What an answer may be; see `k2jax.constrain`."""

    tokenizer: TokenizerLike
    prompt: tuple[int, ...]
    thinks: bool
    tools: Sequence[Tool]
    tool_choice: str | dict[str, Any]
    form: dict[str, Any] | None
    parallel: bool
    first_call: int

    def make_constraint(self) -> Constraint | None:
        """What one answer is held to; None: nothing.

        Raises:
            Refusal: a schema cannot be compiled.
        """
        if not self.tools and not self.form:
            return None
        from k2jax.constrain import make_constraint

        try:
            return make_constraint(
                self.tokenizer,
                tools=self.tools,
                tool_choice=self.tool_choice,
                parallel=self.parallel,
                response_format=self.form,
                thinking=self.thinks,
                prompt=self.prompt,
                first_index=self.first_call,
            )
        except ConfigError as error:
            raise from_mistake(str(error), "tools" if self.tools else "response_format") from None


def read_conversation(body: Body) -> tuple[list[Message], list[dict[str, Any]]]:
    """Messages and tools, checked; a developer's messages are the system's.

    Raises:
        Refusal: one is malformed.
    """
    messages = body.value("messages")
    if not isinstance(messages, list) or not messages:
        body.refuse("messages", "must be a list of at least one message")
    spelled = [
        {**message, "role": "system"}
        if isinstance(message, Mapping) and message.get("role") == "developer"
        else message
        for message in messages
    ]
    tools = body.value("tools")
    try:
        checked, listed = check_messages(spelled), check_tools([] if tools is None else tools)
    except ConfigError as error:
        raise from_mistake(str(error), "messages") from None
    for place, message in enumerate(spelled):
        may_lack = message["role"] == "assistant" or message.get("tools")
        if message.get("content") is None and not may_lack:
            raise Refusal(f"messages[{place}] needs a 'content'", f"messages[{place}].content")
    return checked, listed


def write_prompt(
    tokenizer: TokenizerLike,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    variables: Mapping[str, Any],
    prompt: bool = True,
) -> tuple[int, ...]:
    """Token ids of a conversation, the assistant's turn opened if `prompt`.

    Raises:
        Refusal: the template cannot say it.
    """
    if tokenizer.template is None:
        raise Refusal("this model has no chat template; use /v1/completions", "messages")
    turns = renumber_calls(messages)
    try:
        parts = tokenizer.template.parts(turns, tools, prompt, variables)
        return tuple(to_ids(tokenizer, parts))
    except ConfigError as error:
        raise from_mistake(str(error), "messages") from None


def read_variables(body: Body) -> dict[str, Any]:
    """Variables of the template: thought on or off, and whatever else the client sets.

    Kimi's API has `thinking: {type, keep, effort}`, open-source servers `chat_template_kwargs`.

    Raises:
        Refusal: a field is malformed, or two disagree.
    """
    variables = dict(body.mapping("chat_template_kwargs"))
    wanted: dict[str, Any] = {}
    if "preserve_thinking" in body:
        wanted["preserve_thinking"] = body.flag("preserve_thinking")
    effort = body.text("reasoning_effort") if "reasoning_effort" in body else None
    if effort is not None:
        wanted |= {"thinking": False} if effort == "none" else {"thinking_effort": effort}
    wanted |= _read_thinking(body)
    for name, value in wanted.items():
        if variables.setdefault(name, value) != value:
            body.refuse("chat_template_kwargs", f"sets another {name!r} than the request does")
    if not isinstance(variables.get("thinking", True), bool):
        body.refuse("chat_template_kwargs", "must have true or false for 'thinking'")
    return variables


def _read_thinking(body: Body) -> dict[str, Any]:
    thinking = body.value("thinking")
    if thinking is None:
        return {}
    if isinstance(thinking, bool):
        return {"thinking": thinking}
    kind = thinking.get("type", "enabled") if isinstance(thinking, Mapping) else None
    if kind not in ("enabled", "disabled"):
        body.refuse("thinking", "must have the type 'enabled' or 'disabled'")
    variables: dict[str, Any] = {"thinking": kind == "enabled"}
    keep, effort = thinking.get("keep"), thinking.get("effort")
    if keep not in (None, "all"):
        body.refuse("thinking", f"has keep {keep!r}; it must be 'all' or null")
    if keep == "all":
        variables["preserve_thinking"] = True
    if effort is not None:
        if not isinstance(effort, str):
            body.refuse("thinking", "must have a text for 'effort'")
        variables["thinking_effort"] = effort
    return variables


def _read_logprobs(body: Body) -> int | None:
    wanted = body.flag("logprobs")
    if "top_logprobs" in body and not wanted:
        body.refuse("top_logprobs", "needs 'logprobs'")
    return body.integer("top_logprobs", 0, 0, TOP_LOGPROBS) if wanted else None
