"""Goals made for tools: a maker a kind of tool, in the world as it is."""

import dataclasses
from collections.abc import Callable
from typing import Any

from k2jax.post.synthesis.field_schema import draw_value
from k2jax.post.synthesis.goals import Goal, Scene
from k2jax.post.synthesis.operations import GONE
from k2jax.post.synthesis.speech import speak, spellings
from k2jax.post.synthesis.toolset import Tool
from k2jax.post.synthesis.words import POOLS
from k2jax.post.synthesis.world import Record
from k2jax.post.synthesis.world_file import Entity, Field

# Ways to say one thing; what is asked for follows "could you".
WORDS = {
    "update": (
        "change the {field} of the {record}",
        "correct the {field} of the {record}",
        "enter a new {field} for the {record}",
    ),
    "delete": ("delete the {record} for good", "remove the {record} completely"),
    "add": (
        "add to the {field} of the {record}",
        "raise the {field} of the {record}",
        "put more on the {field} of the {record}",
    ),
    "take": (
        "take something from the {field} of the {record}",
        "lower the {field} of the {record}",
        "reduce the {field} of the {record}",
    ),
    "assign": ("change the {field} of the {record}", "give the {record} another {field}"),
    "note": ("leave a note on the {record}", "write a note for the staff on the {record}"),
    "count": (
        'tell me how many {many} have the {field} "{value}"',
        'count the {many} whose {field} is "{value}"',
    ),
}


def _word(scene: Scene, kind: str, **parts: str) -> str:
    return scene.rng.choice(WORDS[kind]).format(**parts)


def make_goal(scene: Scene, tool: Tool, refusable: bool = True) -> Goal | None:
    """Make a goal for a tool in the world as it is; None: it has none now.

    Args:
        scene: where.
        tool: that does it.
        refusable: goals that the world refuses count too.
    """
    goal = MAKERS[tool.kind](scene, tool)
    if goal is None:
        return None
    goal.confirm = tool.operation.confirm
    role = tool.operation.role
    if not refusable and (goal.refused or (role and role not in scene.world.roles)):
        return None
    return goal


def _entity(scene: Scene, tool: Tool) -> Entity:
    return scene.world.entities[tool.entity]


def _pick(scene: Scene, tool: Tool, *states: str) -> Record | None:
    """A record, in one of the states where some are named."""
    records = scene.records(tool.entity)
    if states:
        records = [one for one in records if one.get("status") in states]
    return scene.rng.choice(records) if records else None


def _blank(tool: Tool) -> Goal:
    return Goal(tool.kind, tool.name, {}, "")


def _on_record(scene: Scene, tool: Tool, record: Record) -> tuple[Goal, str]:
    goal = _blank(tool)
    named = scene.point_to(goal, tool.entity, record)
    goal.arguments[tool.id_name] = record["id"]
    return goal, named


def _move(scene: Scene, tool: Tool) -> Goal | None:
    entity, operation = _entity(scene, tool), tool.operation
    wrong = scene.rng.random() < 0.25
    states = entity.field("status").choices
    before = tuple(s for s in states if s not in operation.before) if wrong else operation.before
    record = _pick(scene, tool, *before) if before else None
    if record is None:
        return None
    goal, named = _on_record(scene, tool, record)
    goal.core = f"{operation.names[0].replace('_', ' ')} the {named}"
    if operation.role and operation.role not in scene.world.roles:
        goal.refused = "permission"
    elif wrong:
        goal.refused = "conflict"
        goal.say.append([str(record["status"]), "cannot", "can't", "not possible"])
    elif _lacks(scene, tool, record):
        goal.refused = "insufficient"
    return goal


def _lacks(scene: Scene, tool: Tool, record: Record) -> bool:
    """Whether an effect of a tool would take more than is left."""
    for effect in tool.operation.effects:
        entity = _entity(scene, tool)
        target = scene.world.state[entity.field(effect.ref).target].get(str(record[effect.ref]), {})
        named = record.get(effect.amount)
        amount = int(effect.amount) if effect.amount.isdigit() else named or 0
        if target.get(effect.field, 0) + effect.sign * amount < 0:
            return True
    return False


def _draw_other(scene: Scene, field: Field, old: Any) -> Any:
    for _ in range(20):
        value = draw_value(field, scene.world.today, scene.rng)
        if value not in (old, None):
            return value
    return None


def _update(scene: Scene, tool: Tool) -> Goal | None:
    record, entity = _pick(scene, tool), _entity(scene, tool)
    fields = [
        field
        for field in entity.fields
        if not (field.fixed or field.initial or field.unique or field.name == entity.key)
        and field.kind not in ("ref", "texts")
        and field.name not in entity.clash
    ]
    if record is None or not fields:
        return None
    field = scene.rng.choice(fields)
    value = _draw_other(scene, field, record[field.name])
    if value is None:
        return None
    goal, named = _on_record(scene, tool, record)
    nested = "changes" in tool.parameters.get("properties", {})
    goal.arguments |= {"changes": {field.name: value}} if nested else {field.name: value}
    goal.core = _word(scene, "update", field=field.label, record=named)
    goal.facts[f"new {field.label}"] = speak(value, field)
    return goal


def _create(scene: Scene, tool: Tool) -> Goal | None:
    entity, goal = _entity(scene, tool), _blank(tool)
    for field in entity.fields:
        if field.initial or (field.optional and scene.rng.random() < 0.5):
            continue
        if field.kind == "ref":
            candidates = scene.records(field.target)
            if not candidates:
                return None
            record = scene.rng.choice(candidates)
            value: Any = record["id"]
            named = scene.point_to(goal, field.target, record)
            same = field.label == field.target.replace("_", " ")
            goal.facts[field.label] = named.removeprefix(f"{field.label} ") if same else named
        else:
            value = draw_value(field, scene.world.today, scene.rng)
            goal.facts[field.label] = speak(value, field)
        if value is not None:
            goal.arguments[field.name] = value
    if tool.operation.role and tool.operation.role not in scene.world.roles:
        goal.refused = "permission"
    elif _is_taken(scene, entity, goal.arguments):
        goal.refused = "conflict"
    elif _lacks(scene, tool, goal.arguments):
        goal.refused = "insufficient"
    goal.core = f"{entity.creates.replace('_', ' ')} a new {entity.name.replace('_', ' ')}"
    key = goal.arguments.get(entity.key)
    goal.subjects = [] if key is None else [str(key)]
    return goal


def _is_taken(scene: Scene, entity: Entity, fields: Record) -> bool:
    for other in scene.world.state[entity.name].values():
        if any(f.unique and other[f.name] == fields.get(f.name) for f in entity.fields):
            return True
        same = entity.clash and all(other.get(n) == fields.get(n) for n in entity.clash)
        if same and other.get("status") not in GONE:
            return True
    return False


def _delete(scene: Scene, tool: Tool) -> Goal | None:
    record = _pick(scene, tool)
    if record is None:
        return None
    goal, named = _on_record(scene, tool, record)
    goal.core = _word(scene, "delete", record=named)
    for entity, field in scene.world.referrers[tool.entity]:
        if any(one[field] == record["id"] for one in scene.world.state[entity].values()):
            goal.refused = "conflict"
    return goal


def _draw_amount(scene: Scene, field: Field, most: Any) -> Any:
    top = max(1, int(most) if isinstance(most, int | float) else field.high)
    amount = scene.rng.randint(1, max(1, min(top, 60)))
    return amount if field.kind == "int" else float(amount)


def _adjust(scene: Scene, tool: Tool) -> Goal | None:
    record, field = _pick(scene, tool), _entity(scene, tool).field(tool.field)
    if record is None or record[field.name] is None:
        return None
    stored = record[field.name]
    amount = _draw_amount(scene, field, stored if tool.sign < 0 else max(field.high, 20))
    too_much = tool.sign < 0 and (scene.rng.random() < 0.2 or stored < amount)
    amount = amount + (int(stored) + 1 if too_much else 0)
    goal, named = _on_record(scene, tool, record)
    goal.arguments["amount"] = amount
    kind = "take" if tool.sign < 0 else "add"
    goal.core = _word(scene, kind, field=field.label, record=named)
    goal.facts["amount"] = speak(amount, field)
    if tool.operation.role and tool.operation.role not in scene.world.roles:
        goal.refused = "permission"
    elif too_much:
        goal.refused = "insufficient"
    return goal


def _transfer(scene: Scene, tool: Tool) -> Goal | None:
    field, records = _entity(scene, tool).field(tool.field), scene.records(tool.entity)
    stuck = (*GONE, "frozen", "blocked", "suspended")
    records = [one for one in records if one.get("status") not in stuck]
    if len(records) < 2:
        return None
    source, target = scene.rng.sample(records, 2)
    amount = _draw_amount(scene, field, source[field.name])
    goal, named = _on_record(scene, tool, source)
    goal.arguments |= {f"to_{tool.entity}_id": target["id"], "amount": amount}
    other = scene.point_to(goal, tool.entity, target)
    goal.core = f"move {field.label} from the {named} to the {other}"
    goal.facts["amount"] = speak(amount, field)
    if tool.operation.role and tool.operation.role not in scene.world.roles:
        goal.refused = "permission"
    elif source[field.name] < amount:
        goal.refused = "insufficient"
    return goal


def _assign(scene: Scene, tool: Tool) -> Goal | None:
    record, entity = _pick(scene, tool), _entity(scene, tool)
    field = entity.field(tool.field)
    targets = scene.records(field.target)
    if record is None or not targets:
        return None
    target = scene.rng.choice(targets)
    if record[field.name] == target["id"]:
        return None
    goal, named = _on_record(scene, tool, record)
    goal.arguments[field.name] = target["id"]
    moved = {**record, field.name: target["id"]}
    clash = field.name in entity.clash and _is_taken(
        scene, dataclasses.replace(entity, fields=()), {n: moved[n] for n in entity.clash}
    )
    if record.get("status") in GONE or clash:
        goal.refused = "conflict"
    goal.core = _word(scene, "assign", field=field.label, record=named)
    goal.facts[f"new {field.label}"] = scene.point_to(goal, field.target, target)
    return goal


def _tag(scene: Scene, tool: Tool) -> Goal | None:
    records = [one for one in scene.records(tool.entity) if tool.kind == "tag" or one["tags"]]
    if not records:
        return None
    record = scene.rng.choice(records)
    choices = [tag for tag in POOLS["tag"] if tag not in record["tags"]]
    tag = scene.rng.choice(choices if tool.kind == "tag" else record["tags"])
    goal, named = _on_record(scene, tool, record)
    goal.arguments["tag"] = tag
    verb, link = ("put the label", "on") if tool.kind == "tag" else ("take the label", "off")
    goal.core = f'{verb} "{tag}" {link} the {named}'
    return goal


def _note(scene: Scene, tool: Tool) -> Goal | None:
    record = _pick(scene, tool)
    if record is None:
        return None
    goal, named = _on_record(scene, tool, record)
    goal.arguments["text"] = scene.rng.choice(POOLS["remark"])
    goal.core = _word(scene, "note", record=named)
    goal.facts["text of the note"] = f'"{goal.arguments["text"]}"'
    return goal


def _get(scene: Scene, tool: Tool) -> Goal | None:
    record, entity = _pick(scene, tool), _entity(scene, tool)
    kinds = ("int", "money", "date", "time", "enum", "word", "pick")
    fields = [f for f in entity.fields if f.kind in kinds and f.name != entity.key]
    fields = [f for f in fields if record and record.get(f.name) is not None]
    if record is None or not fields:
        return None
    field = scene.rng.choice(fields)
    goal, named = _on_record(scene, tool, record)
    goal.core = f"tell me the {field.label} of the {named}"
    goal.say.append(spellings(record[field.name], field))
    return goal


def _draw_filter(scene: Scene, entity: Entity) -> tuple[Field, Any] | None:
    fields = [field for field in entity.fields if field.kind == "enum"]
    if not fields:
        return None
    field = scene.rng.choice(fields)
    return field, scene.rng.choice(field.choices)


def _count(scene: Scene, tool: Tool) -> Goal | None:
    entity = _entity(scene, tool)
    drawn = _draw_filter(scene, entity)
    if drawn is None:
        return None
    field, value = drawn
    goal = _blank(tool)
    goal.arguments["filters"] = {field.name: value}
    records = [r for r in scene.world.state[tool.entity].values() if r[field.name] == value]
    many = entity.plural.replace("_", " ")
    goal.core = _word(scene, "count", many=many, field=field.label, value=value)
    number = len(records)
    if tool.kind == "total":
        added = entity.field(tool.field)
        total = round(sum(record.get(added.name) or 0 for record in records), 2)
        goal.core = f'add up the {added.label} of all {many} with the {field.label} "{value}"'
        goal.say.append(spellings(total, added))
    else:
        words = ["no", "one", "two", "three", "four", "five", "six", "seven"]
        goal.say.append([str(number), *words[number : number + 1]])
    return goal


def _related(scene: Scene, tool: Tool) -> Goal | None:
    entity = _entity(scene, tool)
    field = entity.field(tool.field)
    targets = scene.records(field.target)
    if not targets:
        return None
    target = scene.rng.choice(targets)
    goal = _blank(tool)
    named = scene.point_to(goal, field.target, target)
    goal.arguments[tool.field] = target["id"]
    many = entity.plural.replace("_", " ")
    goal.core = f"list the {many} with this {field.label}: {named}"
    owned = [r for r in scene.world.state[tool.entity].values() if r[field.name] == target["id"]]
    goal.say += [[str(one[entity.key]), str(one["id"])] for one in owned[:4] if one[entity.key]]
    if not owned:
        goal.say.append(["no", "none", "nothing", "not have any", "0"])
    return goal


def _none(scene: Scene, tool: Tool) -> Goal | None:
    return None


def _record(scene: Scene, tool: Tool) -> Goal | None:
    goal = _create(scene, tool)
    if goal is not None:
        goal.core = f"use {tool.name.replace('_', ' ')}"
        goal.refused = ""
    return goal


MAKERS: dict[str, Callable[[Scene, Tool], Goal | None]] = {
    "move": _move,
    "update": _update,
    "create": _create,
    "delete": _delete,
    "adjust": _adjust,
    "transfer": _transfer,
    "assign": _assign,
    "tag": _tag,
    "untag": _tag,
    "note": _note,
    "get": _get,
    "count": _count,
    "total": _count,
    "related": _related,
    "list": _none,
    "search": _none,
    "record": _record,
}
