"""Agents, users and judges behind any OpenAI-compatible endpoint; `k2jax serve` is one."""

import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.config import ConfigError, one_line
from k2jax.post.synthesis.simulate import STOP, Message, RefusedError

TRIES = 4  # of one request
WAIT = 600.0  # seconds for one answer
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # answers that a later try may not give
REFUSALS = (400, 413, 422)  # answers that are about this conversation, not about the server
KEYS = ("K2JAX_API_KEY", "OPENAI_API_KEY")  # where the key is read from


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model answers.

    Attributes:
        url: with or without /chat/completions.
        model: its name there; "": the first that it lists.
        temperature: of sampling.
        most_tokens: of an answer; 0: as many as the server allows.
    """

    url: str
    model: str = ""
    temperature: float = 0.6
    most_tokens: int = 0

    def ask(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), seed: int = 0
    ) -> Message:
        """The model's next message.

        Raises:
            RefusedError: the server does not take this conversation; others it may.
            ConfigError: it does not answer, or with something else; one line says what.
        """
        body: dict[str, Any] = {"model": self.model or self._first_model(), "messages": messages}
        body |= {"temperature": self.temperature, "seed": seed}
        body |= {"tools": list(tools)} if tools else {}
        body |= {"max_tokens": self.most_tokens} if self.most_tokens else {}
        answer = self._request("/chat/completions", body)
        try:
            message = answer["choices"][0]["message"]
            return {"role": "assistant", **message, "content": message.get("content") or ""}
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"{self.url} answers without a message") from None

    def _first_model(self) -> str:
        try:
            return str(self._request("/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ConfigError(f"{self.url} lists no model; name one as URL#MODEL") from None

    def _request(self, path: str, body: Any = None) -> Any:
        url = self.url.rstrip("/").removesuffix("/chat/completions") + path
        headers = {"Content-Type": "application/json"}
        if key := next((os.environ[name] for name in KEYS if os.environ.get(name)), ""):
            headers["Authorization"] = f"Bearer {key}"
        try:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(url, data, headers)
        except ValueError as error:
            raise ConfigError(f"{self.url} is no address: {one_line(error)}") from None
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=WAIT) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}: {one_line(ValueError(error.read().decode()))}"
                if error.code in REFUSALS and body is not None:
                    raise RefusedError(f"{url} refuses: {why}") from None
                if error.code not in AGAIN:
                    break
            except (OSError, ValueError, http.client.HTTPException) as error:
                why = one_line(error)
            time.sleep(2.0**attempt - 1)
        raise ConfigError(f"{url} does not answer: {why}")


def parse_endpoint(text: str, temperature: float = 0.6) -> Endpoint:
    """Read `URL` or `URL#MODEL`.

    Raises:
        ConfigError: it is no address of http or https.
    """
    url, _, model = text.partition("#")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{text!r} is no address; write http://HOST:PORT/v1, or with #MODEL")
    return Endpoint(url, model, temperature)


class EndpointAgent:
    """An agent that is a model."""

    def __init__(self, endpoint: Endpoint, seed: int):
        """Sample with this seed and those after it."""
        self.endpoint, self.seed = endpoint, seed
        self.name = endpoint.model or endpoint.url

    def reply(self, messages: Sequence[Message], tools: Sequence[Any]) -> Message:
        """The model's next message."""
        self.seed += 1
        return self.endpoint.ask(messages, tools, self.seed)


class EndpointUser:
    """A user that is a model, who knows a task's wishes and facts and keeps to its persona."""

    def __init__(self, endpoint: Endpoint, task: Mapping[str, Any], seed: int):
        """Play the user of a task."""
        self.endpoint, self.seed = endpoint, seed
        self.name = endpoint.model or endpoint.url
        wishes = []
        for number, goal in enumerate(task["goals"], start=1):
            facts = "; ".join(f"{label}: {value}" for label, value in goal["facts"].items())
            agree = "disagree" if goal["declines"] else "agree"
            asked = f" Asked to confirm, you {agree}." if goal["confirm"] else ""
            wishes.append(f"{number}. You want the assistant to {goal['core']}. {facts}{asked}")
        self.messages: list[Message] = [
            {
                "role": "system",
                "content": "You play a person who writes to an assistant: "
                f"{task['persona']['text']} Stay in this role, write only this person's next"
                " message, and invent no facts. What you want and know:\n"
                + "\n".join(wishes)
                + f"\nWhen everything is answered, or refused, write {STOP} and nothing else.",
            },
            {"role": "user", "content": "Hello, how can I help?"},
        ]

    def open(self) -> str:
        """The first message."""
        return self.reply("") or ""

    def reply(self, text: str) -> str | None:
        """Answer the agent; None: the conversation is over."""
        if text:
            self.messages.append({"role": "user", "content": text})
        self.seed += 1
        answer = self.endpoint.ask(self.messages, seed=self.seed)["content"].strip()
        self.messages.append({"role": "assistant", "content": answer})
        return None if not answer or STOP in answer else answer


JUDGE = (
    "You judge whether an assistant did its task. It fails if the final state is wrong, if it acted"
    " without a confirmation it needed, if it states what no tool returned, if it calls a forbidden"
    " tool, or if it leaves a message of the user unanswered. Answer with one JSON object:"
    ' {"reason": TEXT, "success": true or false}.'
)


def ask_judge(
    endpoint: Endpoint, task: Mapping[str, Any], messages: Sequence[Message]
) -> tuple[bool, str]:
    """Let a model judge a trajectory by its rubric: whether it succeeds, and why.

    An answer that cannot be read counts as a failure, as does a conversation that is not taken.
    """
    rubric = json.dumps(task["rubric"], ensure_ascii=False)
    shown = json.dumps(list(messages), ensure_ascii=False)
    text = f"Rubric:\n{rubric}\n\nConversation:\n{shown}"
    asked = [{"role": "system", "content": JUDGE}, {"role": "user", "content": text}]
    try:
        content = dataclasses.replace(endpoint, temperature=0.0).ask(asked)["content"]
    except RefusedError as error:
        return False, str(error)
    try:
        verdict = json.loads(content[content.index("{") : content.rindex("}") + 1])
        return verdict["success"] is True, str(verdict.get("reason", ""))
    except (ValueError, KeyError, TypeError):
        return False, "the judge's answer cannot be read"
