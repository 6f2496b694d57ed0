"""What tools do to a world, one function a kind; a refusal leaves the world as it was."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from k2jax.post.synthesis.field_schema import initial_value, shown_fields
from k2jax.post.synthesis.toolset import Tool
from k2jax.post.synthesis.world_file import Effect, Entity, Operation

if TYPE_CHECKING:
    from k2jax.post.synthesis.world import World

PAGE = 10  # records in a list, if no limit is named
CENTS = 2  # digits behind the point of money
GONE = ("cancelled", "canceled", "closed", "expired", "declined", "rejected", "no-show")

Arguments = Mapping[str, Any]
Record = dict[str, Any]


class Refused(Exception):
    """The world does not do this; `code` as `World.call` has them."""

    def __init__(self, code: str, message: str, **more: Any):
        super().__init__(message)
        self.code, self.message, self.more = code, message, more


def find_record(world: "World", entity: str, id_: Any) -> Record:
    """The record of that id.

    Raises:
        Refused: there is none.
    """
    record = world.state[entity].get(str(id_))
    if record is None:
        raise Refused("not_found", f"there is no {entity.replace('_', ' ')} {id_}")
    return record


def find_clash(world: "World", entity: Entity, record: Record) -> str:
    """The id of a record that takes the same place or time; "" where none does."""
    if not entity.clash:
        return ""
    for other in world.state[entity.name].values():
        same = all(other.get(name) == record.get(name) for name in entity.clash)
        if same and other.get("status") not in GONE and other.get("id") != record.get("id"):
            return str(other["id"])
    return ""


def _entity(world: "World", tool: Tool) -> Entity:
    return world.entities[tool.entity]


def _show(tool: Tool, record: Record) -> Record:
    return {tool.entity: dict(record)}


def _require_role(world: "World", tool: Tool) -> None:
    role = tool.operation.role
    if role and role not in world.roles:
        raise Refused("permission", f"{tool.name} needs the role {role}, which you do not have")


def _require_confirmation(tool: Tool, arguments: Arguments, summary: str) -> None:
    if tool.operation.confirm and arguments.get("confirmed") is not True:
        raise Refused(
            "confirmation_needed", "ask the user first, then repeat with confirmed", summary=summary
        )


def _get(world: "World", tool: Tool, arguments: Arguments) -> Record:
    return _show(tool, find_record(world, tool.entity, arguments.get(tool.id_name)))


def _select(world: "World", tool: Tool, filters: Mapping[str, Any]) -> list[Record]:
    entity = _entity(world, tool)
    names = [name for name in filters if entity.has(name)]
    records = world.state[tool.entity].values()
    return [one for one in records if all(one.get(name) == filters[name] for name in names)]


def _number(value: Any, otherwise: int) -> int:
    """The number, where it is one; imported tools may have texts in its place."""
    return int(value) if isinstance(value, int | float) else otherwise


def _brief(world: "World", tool: Tool, records: Sequence[Record]) -> list[Record]:
    names = shown_fields(_entity(world, tool))
    return [{name: record.get(name) for name in names} for record in records]


def _list(world: "World", tool: Tool, arguments: Arguments) -> Record:
    filters = {k: v for k, v in arguments.items() if k not in ("sort_by", "limit", "offset")}
    records = _select(world, tool, filters)
    if order := arguments.get("sort_by"):
        records.sort(key=lambda one: (str(type(one.get(order))), one.get(order) or 0, one["id"]))
    start, limit = _number(arguments.get("offset"), 0), _number(arguments.get("limit"), PAGE)
    page: Record = {
        _entity(world, tool).plural: _brief(world, tool, records[start : start + limit])
    }
    page["matches"] = len(records)
    if start + limit < len(records):
        page["next_offset"] = start + limit
    return page


def _search(world: "World", tool: Tool, arguments: Arguments) -> Record:
    texts = [value for value in arguments.values() if isinstance(value, str)]
    query = texts[0].casefold().strip() if texts else ""
    matches = [one for one in world.state[tool.entity].values() if _mentions(one, query)]
    limit = _number(arguments.get("limit"), PAGE)
    plural = _entity(world, tool).plural
    return {plural: _brief(world, tool, matches[:limit]), "matches": len(matches)}


def _mentions(record: Record, query: str) -> bool:
    return any(query in value.casefold() for value in record.values() if isinstance(value, str))


def _count(world: "World", tool: Tool, arguments: Arguments) -> Record:
    return {"count": len(_select(world, tool, arguments.get("filters", {})))}


def _total(world: "World", tool: Tool, arguments: Arguments) -> Record:
    records = _select(world, tool, arguments.get("filters", {}))
    total = round(sum(record.get(tool.field) or 0 for record in records), CENTS)
    return {"total": total, "count": len(records)}


def _related(world: "World", tool: Tool, arguments: Arguments) -> Record:
    entity = _entity(world, tool)
    find_record(world, entity.field(tool.field).target, arguments[tool.field])
    records = _select(world, tool, {tool.field: arguments[tool.field]})
    limit = _number(arguments.get("limit"), PAGE)
    return {entity.plural: _brief(world, tool, records[:limit]), "matches": len(records)}


def _check_fields(world: "World", tool: Tool, fields: Record, record: Record) -> None:
    """Refuse ids of nothing, a name that is taken, a place that is taken."""
    entity = _entity(world, tool)
    for field in entity.fields:
        if field.name in fields and field.kind == "ref" and fields[field.name] is not None:
            find_record(world, field.target, fields[field.name])
        if field.unique and field.name in fields:
            for other in world.state[entity.name].values():
                if other[field.name] == fields[field.name] and other["id"] != record.get("id"):
                    raise Refused("conflict", f"{other['id']} has the same {field.label}")
    if entity.clash and any(name in fields for name in entity.clash):
        if other_id := find_clash(world, entity, {**record, **fields}):
            raise Refused("conflict", f"{other_id} is at the same {entity.clash[-1]}")


def _create(world: "World", tool: Tool, arguments: Arguments) -> Record:
    entity = _entity(world, tool)
    _require_role(world, tool)
    values = {field.name: arguments.get(field.name) for field in entity.fields}
    for field in entity.fields:
        if field.initial and field.name not in arguments:
            values[field.name] = initial_value(field)
    _check_fields(world, tool, {k: v for k, v in values.items() if v is not None}, values)
    steps = _plan_effects(world, tool.operation, values, entity)
    shown = ", ".join(f"{k} {v}" for k, v in arguments.items() if k != "confirmed")
    _require_confirmation(tool, arguments, f"{tool.name}: {shown}")
    _apply_effects(steps)
    return _show(tool, world.add(entity, values))


def _update(world: "World", tool: Tool, arguments: Arguments) -> Record:
    record = find_record(world, tool.entity, arguments.get(tool.id_name))
    entity = _entity(world, tool)
    named = arguments.get("changes", arguments)
    changes = {k: v for k, v in named.items() if k != tool.id_name and entity.has(k)}
    _check_fields(world, tool, changes, record)
    record.update(changes)
    return _show(tool, record)


def _delete(world: "World", tool: Tool, arguments: Arguments) -> Record:
    record = find_record(world, tool.entity, arguments.get(tool.id_name))
    _require_role(world, tool)
    for entity, field in world.referrers[tool.entity]:
        for other in world.state[entity].values():
            if other[field] == record["id"]:
                raise Refused("conflict", f"{entity.replace('_', ' ')} {other['id']} refers to it")
    _require_confirmation(tool, arguments, f"{tool.name}: {record['id']}")
    del world.state[tool.entity][str(record["id"])]
    return {"deleted": record["id"]}


def _move(world: "World", tool: Tool, arguments: Arguments) -> Record:
    record = find_record(world, tool.entity, arguments.get(tool.id_name))
    operation, entity = tool.operation, _entity(world, tool)
    _require_role(world, tool)
    if record["status"] not in operation.before:
        wanted = " or ".join(operation.before)
        raise Refused("conflict", f"{record['id']} is {record['status']}; it must be {wanted}")
    steps = _plan_effects(world, operation, record, entity)
    summary = f"{tool.name}: {record['id']} ({record.get(entity.key)}) becomes {operation.after}"
    for target, field, change in steps:
        summary += f"; {field} of {target['id']} changes by {change:+}"
    _require_confirmation(tool, arguments, summary)
    _apply_effects(steps)
    record["status"] = operation.after
    return _show(tool, record)


Steps = list[tuple[Record, str, Any]]


def _plan_effects(world: "World", operation: Operation, record: Record, entity: Entity) -> Steps:
    """What an operation adds to other records.

    Raises:
        Refused: one has not enough, or is not there.
    """
    steps: Steps = []
    for effect in operation.effects:
        amount = int(effect.amount) if effect.amount.isdigit() else record.get(effect.amount) or 0
        steps.append(_plan_effect(world, effect, amount, record, entity))
    return steps


def _plan_effect(
    world: "World", effect: Effect, amount: Any, record: Record, entity: Entity
) -> tuple[Record, str, Any]:
    target = find_record(world, entity.field(effect.ref).target, record[effect.ref])
    if target[effect.field] + effect.sign * amount < 0:
        raise Refused(
            "insufficient",
            f"{target['id']} has {target[effect.field]} {effect.field}; {amount} would be needed",
        )
    return target, effect.field, effect.sign * amount


def _apply_effects(steps: Steps) -> None:
    for target, field, change in steps:
        target[field] = _sum(target[field], change)


def _sum(value: Any, change: Any) -> Any:
    total = value + change
    return round(total, CENTS) if isinstance(total, float) else total


def _adjust(world: "World", tool: Tool, arguments: Arguments) -> Record:
    record = find_record(world, tool.entity, arguments.get(tool.id_name))
    _require_role(world, tool)
    change = tool.sign * _whole(arguments["amount"], record[tool.field])
    _require_enough(record, tool.field, change)
    _require_confirmation(tool, arguments, f"{tool.name}: {record['id']} by {change:+}")
    record[tool.field] = _sum(record[tool.field], change)
    return _show(tool, record)


def _whole(amount: Any, like: Any) -> Any:
    """The amount as the field has them: 3.0 of what is counted is 3."""
    return int(amount) if isinstance(like, int) else round(float(amount), CENTS)


def _require_enough(record: Record, field: str, change: Any) -> None:
    if record[field] + change < 0:
        raise Refused(
            "insufficient", f"{record['id']} has {record[field]} {field}, less than {-change}"
        )


def _transfer(world: "World", tool: Tool, arguments: Arguments) -> Record:
    source = find_record(world, tool.entity, arguments[tool.id_name])
    target = find_record(world, tool.entity, arguments[f"to_{tool.entity}_id"])
    _require_role(world, tool)
    if source is target:
        raise Refused("invalid", "both ends are the same")
    for end in (source, target):
        if end.get("status") in (*GONE, "frozen", "blocked", "suspended"):
            raise Refused("conflict", f"{end['id']} is {end['status']}")
    amount = _whole(arguments["amount"], source[tool.field])
    _require_enough(source, tool.field, -amount)
    summary = f"{tool.name}: {amount} from {source['id']} to {target['id']}"
    _require_confirmation(tool, arguments, summary)
    source[tool.field] = _sum(source[tool.field], -amount)
    target[tool.field] = _sum(target[tool.field], amount)
    return {"from": dict(source), "to": dict(target)}


def _assign(world: "World", tool: Tool, arguments: Arguments) -> Record:
    record = find_record(world, tool.entity, arguments.get(tool.id_name))
    _require_role(world, tool)
    target = find_record(
        world, _entity(world, tool).field(tool.field).target, arguments[tool.field]
    )
    if record[tool.field] == target["id"]:
        raise Refused("conflict", f"{record['id']} is {target['id']}'s already")
    if record.get("status") in GONE:
        raise Refused("conflict", f"{record['id']} is {record['status']}")
    _check_fields(world, tool, {tool.field: target["id"]}, record)
    _require_confirmation(tool, arguments, f"{tool.name}: {record['id']} to {target['id']}")
    record[tool.field] = target["id"]
    return _show(tool, record)


def _tag(world: "World", tool: Tool, arguments: Arguments) -> Record:
    record = find_record(world, tool.entity, arguments.get(tool.id_name))
    if arguments["tag"] in record["tags"]:
        raise Refused("conflict", f"{record['id']} has that tag already")
    record["tags"] = [*record["tags"], arguments["tag"]]
    return _show(tool, record)


def _untag(world: "World", tool: Tool, arguments: Arguments) -> Record:
    record = find_record(world, tool.entity, arguments.get(tool.id_name))
    if arguments["tag"] not in record["tags"]:
        raise Refused("not_found", f"{record['id']} has no tag {arguments['tag']}")
    record["tags"] = [tag for tag in record["tags"] if tag != arguments["tag"]]
    return _show(tool, record)


def _note(world: "World", tool: Tool, arguments: Arguments) -> Record:
    record = find_record(world, tool.entity, arguments.get(tool.id_name))
    record["notes"] = [*record["notes"], arguments["text"]]
    return _show(tool, record)


def _record(world: "World", tool: Tool, arguments: Arguments) -> Record:
    """What an imported tool of unknown meaning does: its call is stored as a record."""
    entity = _entity(world, tool)
    return _show(tool, world.add(entity, {f.name: arguments.get(f.name) for f in entity.fields}))


RUN: dict[str, Callable[["World", Tool, Arguments], Record]] = {
    "get": _get,
    "list": _list,
    "search": _search,
    "count": _count,
    "total": _total,
    "related": _related,
    "create": _create,
    "update": _update,
    "delete": _delete,
    "move": _move,
    "adjust": _adjust,
    "transfer": _transfer,
    "assign": _assign,
    "tag": _tag,
    "untag": _untag,
    "note": _note,
    "record": _record,
}
