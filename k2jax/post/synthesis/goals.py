"""What users want: a goal a tool, with what they say, what they know, what must come of it."""

import dataclasses
import random
from typing import Any

from k2jax.post.synthesis.speech import name_record
from k2jax.post.synthesis.toolset import Tool
from k2jax.post.synthesis.world import Record, World

KNOWS_ID = 0.35  # share of records that users know by id, not by name


@dataclasses.dataclass
class Goal:
    """One thing that a user wants.

    Attributes:
        kind: of the tool.
        tool: that does it.
        arguments: with which, `confirmed` aside.
        core: the wish, to follow "could you"; without what is in `facts`.
        facts: what the user adds at once, or when asked; by what they are called.
        subjects: ids of records it is about; the answer names one, or one of their names.
        lookups: searches by which the ids are found: (tool, query).
        refused: code of the error that is the right outcome; "": it is done.
        confirm: the user is asked first.
        declines: and says no.
        say: what the answer must name, each in one of its spellings.
    """

    kind: str
    tool: str
    arguments: dict[str, Any]
    core: str
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    subjects: list[str] = dataclasses.field(default_factory=list)
    lookups: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    refused: str = ""
    confirm: bool = False
    declines: bool = False
    say: list[list[str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Scene:
    """Where goals are made: a world as it is now, what the agent can call, and a generator."""

    world: World
    tools: dict[str, Tool]
    rng: random.Random

    def records(self, entity: str) -> list[Record]:
        """Records that have a name, which people can speak of."""
        key = self.world.entities[entity].key
        return [one for one in self.world.state[entity].values() if one.get(key)]

    def point_to(self, goal: Goal, entity: str, record: Record) -> str:
        """Name a record to the agent; by name if it can be searched for."""
        kind = self.world.entities[entity]
        search = f"search_{kind.plural}"
        by_id = search not in self.tools or self.rng.random() < KNOWS_ID
        goal.subjects.append(str(record["id"]))
        if not by_id:
            goal.lookups.append((search, str(record[kind.key])))
        return name_record(kind, record, by_id)
