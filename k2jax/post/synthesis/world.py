"""A world in memory: records, a day, roles; tools act on it, and every call can be replayed."""

import datetime
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.post.synthesis import operations
from k2jax.post.synthesis.check_arguments import describe_mistake
from k2jax.post.synthesis.field_schema import draw_value, initial_value
from k2jax.post.synthesis.toolset import Tool
from k2jax.post.synthesis.words import DAY_ZERO
from k2jax.post.synthesis.world_file import Domain, Entity, Field

RECORDS = 7  # of each entity
DAYS = 300  # a world's day is one of these
TRIES = 50  # draws for a name that nobody has

Record = dict[str, Any]
Result = dict[str, Any]


class World:
    """Records of some domains. The same arguments make the same world, on any machine.

    Attributes:
        state: records by entity and id; plain JSON.
        today: the day, which does not pass.
        roles: that the caller has.
        calls: so far.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        tools: Sequence[Tool],
        seed: str,
        roles: Sequence[str] = (),
        faults: float = 0.0,
    ):
        """Fill the world.

        Args:
            domains: whose entities it has.
            tools: that can be called.
            seed: of its records, and of its faults.
            roles: see `Operation.role`.
            faults: share of calls that fail with "unavailable" and change nothing. Whether the
                n-th call does depends on `seed` and n alone.
        """
        rng = random.Random(f"world {seed}")
        self.seed, self.faults, self.roles = seed, faults, frozenset(roles)
        self.entities: dict[str, Entity] = {e.name: e for d in domains for e in d.entities}
        self.tools: dict[str, Tool] = {tool.name: tool for tool in tools}
        self.today = DAY_ZERO + datetime.timedelta(days=rng.randrange(DAYS))
        self.state: dict[str, dict[str, Record]] = {name: {} for name in self.entities}
        self.referrers = self._find_referrers()
        self.next_ids: dict[str, int] = {}
        self.calls = 0
        self._digest = ""
        for entity in self.entities.values():
            self._fill(entity, rng)

    def call(self, name: str, arguments: Mapping[str, Any] | str) -> Result:
        """Call a tool: what it returns, an `error` with `code` and `message` where it is refused.

        Codes: unknown_tool, invalid, not_found, conflict, insufficient, permission,
        confirmation_needed, unavailable. A call that is refused changes nothing.

        Args:
            name: of the tool.
            arguments: an object, or its JSON text.
        """
        self.calls += 1
        if self._fails():
            return _refusal("unavailable", "the service did not answer; try again")
        tool = self.tools.get(name)
        if tool is None:
            return _refusal("unknown_tool", f"there is no tool {name}")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return _refusal("invalid", "the arguments are not JSON")
        if wrong := describe_mistake(tool.parameters, arguments):
            return _refusal("invalid", wrong)
        assert isinstance(arguments, Mapping)
        try:
            result = operations.RUN[tool.kind](self, tool, arguments)
        except operations.Refused as refused:
            return _refusal(refused.code, refused.message, **refused.more)
        if tool.writes:
            self._digest = ""
        return result

    def digest(self) -> str:
        """Sixteen hex digits of everything that is stored."""
        if not self._digest:
            text = json.dumps(self.state, sort_keys=True, separators=(",", ":"))
            self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._digest

    def snapshot(self) -> dict[str, dict[str, Record]]:
        """A copy of the records that later calls leave alone."""
        return json.loads(json.dumps(self.state))

    def add(self, entity: Entity, fields: Record) -> Record:
        """Store a new record under the next id."""
        number = self.next_ids[entity.name]
        self.next_ids[entity.name] += 1
        id_: Any = number if entity.numbered else f"{_prefix(entity)}-{number}"
        record = {"id": id_, **fields}
        self.state[entity.name][str(id_)] = record
        return record

    def _fails(self) -> bool:
        if not self.faults:
            return False
        drawn = hashlib.sha256(f"{self.seed} call {self.calls}".encode()).digest()
        return int.from_bytes(drawn[:4], "big") < self.faults * 2**32

    def _find_referrers(self) -> dict[str, list[tuple[str, str]]]:
        """Which fields of which entities hold ids of each entity."""
        pairs: dict[str, list[tuple[str, str]]] = {name: [] for name in self.entities}
        for entity in self.entities.values():
            for field in entity.fields:
                if field.kind == "ref" and field.target in pairs:
                    pairs[field.target].append((entity.name, field.name))
        return pairs

    def _fill(self, entity: Entity, rng: random.Random) -> None:
        self.next_ids[entity.name] = rng.randrange(1000, 9000)
        for _ in range(RECORDS):
            for _ in range(TRIES):
                record = {field.name: self._draw(entity, field, rng) for field in entity.fields}
                if not self._is_taken(entity, record):
                    self.add(entity, record)
                    break
            self.next_ids[entity.name] += rng.randrange(1, 40)

    def _draw(self, entity: Entity, field: Field, rng: random.Random) -> Any:
        if field.kind == "ref":
            ids = [record["id"] for record in self.state.get(field.target, {}).values()]
            return rng.choice(ids) if ids else ""
        if field.kind == "texts" and field.name == "notes":
            return initial_value(field)
        if field.optional and rng.random() < 0.3:
            return None
        return draw_value(field, self.today, rng)

    def _is_taken(self, entity: Entity, record: Record) -> bool:
        """Whether people could not tell a new record from another, or it clashes with one."""
        others = self.state[entity.name].values()
        names = [entity.key, *(field.name for field in entity.fields if field.unique)]
        if any(other[name] == record[name] for other in others for name in names):
            return True
        return bool(operations.find_clash(self, entity, record))


def _prefix(entity: Entity) -> str:
    words = entity.name.split("_")
    return (words[0][:3] if len(words) == 1 else "".join(w[0] for w in words)).upper()


def _refusal(code: str, message: str, **more: Any) -> Result:
    return {"error": {"code": code, "message": message, **more}}


def find_changes(before: dict[str, dict[str, Record]], after: dict[str, dict[str, Record]]) -> list:
    """What differs between two states: [entity, id, field, new value], sorted.

    A new record's field is "+" and its value the record without its id; a removed one's is "-".
    """
    changes: list[list[Any]] = []
    for entity in sorted(after):
        old, new = before.get(entity, {}), after[entity]
        for id_ in sorted({*old, *new}):
            if id_ not in new:
                changes.append([entity, id_, "-", None])
            elif id_ not in old:
                fields = {name: value for name, value in new[id_].items() if name != "id"}
                changes.append([entity, id_, "+", fields])
            elif old[id_] != new[id_]:
                changes += [
                    [entity, id_, name, value]
                    for name, value in sorted(new[id_].items())
                    if old[id_].get(name) != value
                ]
    return changes
