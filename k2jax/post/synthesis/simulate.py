"""One conversation: a user, an agent and a world, until the user is done; all of it logged."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from k2jax.config import ConfigError
from k2jax.post.synthesis.world import World

TURNS = 24  # messages of the user at most
CALLS = 60  # calls at most
REFUSED = "refused"  # begins why a conversation ended that a server did not take
STOP = "###STOP###"  # what a user of an endpoint says at the end

Message = dict[str, Any]


class RefusedError(ConfigError):
    """A model's server does not take this conversation, such as one longer than its context."""


class User(Protocol):
    """Who asks."""

    name: str

    def open(self) -> str:
        """The first message."""
        ...

    def reply(self, text: str) -> str | None:
        """Answer the agent; None ends the conversation."""
        ...


class Agent(Protocol):
    """Who answers."""

    name: str

    def reply(self, messages: Sequence[Message], tools: Sequence[Any]) -> Message:
        """The assistant's next message."""
        ...


@dataclasses.dataclass
class Trajectory:
    """A conversation and what it did to its world.

    Attributes:
        task: its id.
        agent: who answered: "oracle", or a model's name.
        user: who asked: "scripted", or a model's name.
        messages: from the system prompt to the last answer.
        calls: tool, arguments as they were written, result, and digest of the world after it.
        start: digest of the world before the first call.
        ended: "done" by the user; "turns", "calls": a limit; "refused: ...": by a model's server.
    """

    task: str
    agent: str
    user: str
    messages: list[Message]
    calls: list[dict[str, Any]]
    start: str
    ended: str = "done"

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return dataclasses.asdict(self)


class Session:
    """A world with the messages so far: what an agent's messages do.

    Attributes:
        trajectory: so far.
    """

    def __init__(self, world: World, prompt: str, task: str = "", agent: str = "", user: str = ""):
        """Begin with the system prompt."""
        self.world = world
        messages: list[Message] = [{"role": "system", "content": prompt}]
        self.trajectory = Trajectory(task, agent, user, messages, [], world.digest())

    def hear(self, text: str) -> None:
        """Add a message of the user."""
        self.trajectory.messages.append({"role": "user", "content": text})

    def act(self, message: Mapping[str, Any]) -> list[Message]:
        """Add a message of the agent; the results of its calls, which are added too."""
        out: Message = {"role": "assistant", "content": message.get("content") or ""}
        if message.get("reasoning_content"):
            out["reasoning_content"] = message["reasoning_content"]
        results: list[Message] = []
        calls = []
        for call in message.get("tool_calls") or ():
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            id_ = f"functions.{name}:{len(self.trajectory.calls)}"
            function = {"name": name, "arguments": arguments}
            calls.append({"id": id_, "type": "function", "function": function})
            results.append(
                {"role": "tool", "tool_call_id": id_, "content": self.call(name, arguments)}
            )
        if calls:
            out["tool_calls"] = calls
        self.trajectory.messages += [out, *results]
        return results

    def call(self, name: str, arguments: str) -> str:
        """Call a tool and log it; the text of its result."""
        result = self.world.call(name, arguments)
        logged = {"tool": name, "arguments": arguments, "result": result}
        self.trajectory.calls.append({**logged, "state": self.world.digest()})
        return json.dumps(result, ensure_ascii=False)


def converse(session: Session, user: User, agent: Agent, tools: Sequence[Any]) -> Trajectory:
    """Let a user and an agent talk until the user is done or a limit is reached.

    Args:
        session: with the system prompt.
        user: speaks first.
        agent: answers; may call tools before it does.
        tools: as the OpenAI API declares them.
    """
    try:
        session.trajectory.ended = _take_turns(session, user, agent, tools)
    except RefusedError as error:
        session.trajectory.ended = f"{REFUSED}: {error}"
    return session.trajectory


def _take_turns(session: Session, user: User, agent: Agent, tools: Sequence[Any]) -> str:
    """Let both talk; why they ended."""
    said: str | None = user.open()
    for _ in range(TURNS):
        if said is None or said.strip() == STOP:
            return "done"
        session.hear(said)
        text = _let_agent_work(session, agent, tools)
        if text is None:
            return "calls"
        said = user.reply(text)
    return "turns"


def _let_agent_work(session: Session, agent: Agent, tools: Sequence[Any]) -> str | None:
    """Let the agent call tools until it says something; None: it never does."""
    while len(session.trajectory.calls) < CALLS:
        message = agent.reply(session.trajectory.messages, tools)
        if not session.act(message):
            return session.trajectory.messages[-1]["content"]
    return None
