"""Agents: an application of one or two worlds, the tools and roles it has, its system prompt."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.post.synthesis.toolset import Tool
from k2jax.post.synthesis.world import World
from k2jax.post.synthesis.world_file import Domain

TOOLS = 24  # of one agent, at most
WITH_READS = 4  # tools an entity at least: two that read, two that do something
READS = ("get", "search")  # that an agent has for each of its entities
PROMPTS = (
    "You are the {role} of {owner}, {text}.",
    "You work for {owner} ({text}) as its {role}.",
    "{owner} is {text}. You are its {role} and answer whoever writes.",
)
RULES = (
    "Use the tools; never guess what a tool can tell you, and never claim what no tool has done.",
    "Where a tool asks for confirmation, say what would happen, ask the user, and go on only after"
    " a clear yes.",
    "If something is refused, say why. If a service does not answer, try again.",
    "Ask for what you need and cannot look up. Do nothing that was not asked for.",
)


@dataclasses.dataclass(frozen=True)
class Application:
    """What an agent is: its worlds, tools, roles and system prompt."""

    id: str
    domains: tuple[str, ...]
    entities: tuple[str, ...]
    tools: tuple[str, ...]
    roles: tuple[str, ...]
    prompt: str


class Library:
    """Worlds and tools by name; makes the world of a task."""

    def __init__(self, domains: Sequence[Domain], tools: Sequence[Tool]):
        """Index them."""
        self.domains = {domain.name: domain for domain in domains}
        self.tools = {tool.name: tool for tool in tools}
        self.by_entity: dict[str, list[Tool]] = {}
        for tool in tools:
            self.by_entity.setdefault(tool.entity, []).append(tool)

    def make_world(
        self, agent: Mapping[str, Any] | Application, seed: str, faults: float = 0.0
    ) -> World:
        """The world of an agent's tasks: the same for the same seed."""
        fields = agent if isinstance(agent, Mapping) else dataclasses.asdict(agent)
        return World(
            [self.domains[name] for name in fields["domains"]],
            [self.tools[name] for name in fields["tools"]],
            seed,
            fields["roles"],
            faults,
        )

    def declare(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Tools as the OpenAI API has them."""
        return [self.tools[name].declare() for name in names]


def make_application(library: Library, number: int, seed: int, limit: int = TOOLS) -> Application:
    """Make the agent of that number; its first world is the number's, in turn.

    Args:
        library: with at least one world.
        number: from 0.
        seed: of the whole run.
        limit: tools that it has at most.
    """
    rng = random.Random(f"agent {seed} {number}")
    names = list(library.domains)
    first = names[number % len(names)]
    others = [name for name in names if name != first]
    chosen = [first, *(rng.sample(others, 1) if others and rng.random() < 0.25 else ())]
    entities = [
        entity for name in chosen for entity in _choose_entities(library.domains[name], rng)
    ]
    entities = entities[: max(1, limit // WITH_READS)]
    tools = _choose_tools(library, entities, limit, rng)
    needed = sorted({tool.operation.role for tool in tools} - {""})
    roles = [role for role in needed if rng.random() < 0.5]
    prompt = _write_prompt([library.domains[name] for name in chosen], roles, rng)
    return Application(
        f"agent-{number:04d}",
        tuple(chosen),
        tuple(entities),
        tuple(tool.name for tool in tools),
        tuple(roles),
        prompt,
    )


def _choose_entities(domain: Domain, rng: random.Random) -> list[str]:
    """Two or three entities, and those that their operations change."""
    names = [entity.name for entity in domain.entities]
    chosen = set(rng.sample(names, min(len(names), rng.randint(2, 3))))
    for entity in domain.entities:
        if entity.name in chosen:
            chosen |= {field.target for field in entity.fields if field.kind == "ref"} & set(names)
    return [name for name in names if name in chosen]


def _choose_tools(
    library: Library, entities: Sequence[str], limit: int, rng: random.Random
) -> list[Tool]:
    """What reads, and as many of the rest as one agent has; in the order of the library."""
    tools = [tool for name in entities for tool in library.by_entity.get(name, ())]
    kept = {tool.name for tool in tools if tool.kind in READS}
    rest = [tool.name for tool in tools if tool.name not in kept]
    kept |= set(rng.sample(rest, max(0, min(len(rest), limit - len(kept)))))
    return [tool for tool in tools if tool.name in kept]


def _write_prompt(domains: Sequence[Domain], roles: Sequence[str], rng: random.Random) -> str:
    opening = rng.choice(PROMPTS)
    parts = [
        opening.format(role=domain.role, owner=domain.owner, text=domain.text) for domain in domains
    ]
    owned = f"Your roles: {', '.join(roles)}." if roles else "You have no special role."
    return " ".join([*parts, *RULES, owned])
