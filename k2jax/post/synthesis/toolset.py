"""Tools composed from a world: what can be done to each entity, with schemas and descriptions."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from k2jax.post.synthesis.field_schema import Schema, field_schema, object_schema
from k2jax.post.synthesis.world_file import Domain, Entity, Field, Operation

NOTHING = Operation("")
WRITES = (
    "create", "update", "delete", "move", "adjust", "transfer", "assign", "tag", "untag", "note",
    "record",
)  # fmt: skip
REASON: Schema = {"type": "string", "maxLength": 200, "description": "Why, for the record."}
CONFIRMED: Schema = {
    "type": "boolean",
    "description": "True only after the user has agreed to exactly this; without it nothing is"
    " done and a summary comes back to be confirmed.",
}
LIMIT: Schema = {
    "type": "integer", "minimum": 1, "maximum": 50, "description": "At most so many; 10 if absent."
}  # fmt: skip
OFFSET: Schema = {
    "type": "integer", "minimum": 0, "description": "How many to skip, to read on; 0 if absent."
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tool:
    """What an agent can call.

    Attributes:
        name: unique over all worlds.
        text: description for the model.
        parameters: JSON schema of its arguments.
        domain: name of its world.
        entity: what it acts on.
        kind: get, list, search, count, total, related, or one of WRITES.
        operation: of the world file, where it is one.
        id_name: argument that names the record.
        field: that it changes, adds up, or (of `related`) follows.
        sign: of an adjustment.
    """

    name: str
    text: str
    parameters: Schema
    domain: str
    entity: str
    kind: str
    operation: Operation = NOTHING
    id_name: str = ""
    field: str = ""
    sign: int = 1

    @property
    def writes(self) -> bool:
        """Whether it can change the world."""
        return self.kind in WRITES

    def declare(self) -> dict[str, Any]:
        """The tool as the OpenAI API has it."""
        function = {"name": self.name, "description": self.text, "parameters": self.parameters}
        return {"type": "function", "function": function}


def compose_tools(domain: Domain) -> list[Tool]:
    """All tools of a world, in a fixed order."""
    return [tool for entity in domain.entities for tool in _Composer(domain, entity).tools()]


class _Composer:
    """Makes the tools of one entity."""

    def __init__(self, domain: Domain, entity: Entity):
        self.domain, self.entity = domain, entity
        self.one = entity.name.replace("_", " ")
        self.many = entity.plural.replace("_", " ")
        self.id_name = f"{entity.name}_id"
        self.id_schema: Schema = {"type": "string", "description": f"Id of the {self.one}."}

    def tools(self) -> Iterator[Tool]:
        makers = {
            "get": self._get, "list": self._list, "search": self._search, "count": self._count,
            "create": self._create, "update": self._update, "delete": self._delete,
        }  # fmt: skip
        for name, make in makers.items():
            if name not in self.entity.absent:
                yield make()
        yield from self._related()
        for operation in self.entity.operations:
            if operation.kind != "delete":
                yield from getattr(self, f"_{operation.kind}")(operation)

    def _tool(self, name: str, text: str, parameters: Schema, kind: str, **more: Any) -> Tool:
        return Tool(
            name, text, parameters, self.domain.name, self.entity.name, kind,
            id_name=more.pop("id_name", self.id_name), **more,
        )  # fmt: skip

    def _on_one(self, operation: Operation, properties: Schema, required: list[str]) -> Schema:
        """The schema of an operation on one record."""
        shown = {self.id_name: self.id_schema, **properties}
        shown |= {"confirmed": CONFIRMED} if operation.confirm else {}
        return {
            "type": "object",
            "properties": shown,
            "required": [self.id_name, *required],
            "additionalProperties": False,
        }

    def _get(self) -> Tool:
        text = f"Look up one {self.one} ({self.entity.text}) by id. Returns all that is stored."
        return self._tool(
            f"get_{self.entity.name}", text, self._on_one(Operation(""), {}, []), "get"
        )

    def _filters(self) -> dict[str, Schema]:
        kinds = ("enum", "ref", "bool")
        fields = [field for field in self.entity.fields if field.kind in kinds]
        return {field.name: field_schema(field) for field in fields}

    def _list(self) -> Tool:
        order = [f.name for f in self.entity.fields if f.kind in ("int", "money", "date", "pick")]
        sort = {"type": "string", "enum": ["id", *order], "description": "Order; by id if absent."}
        properties = {**self._filters(), "sort_by": sort, "limit": LIMIT, "offset": OFFSET}
        schema = {"type": "object", "properties": properties, "additionalProperties": False}
        text = f"List {self.many}, all or those that match every filter, a page at a time."
        return self._tool(f"list_{self.entity.plural}", text, schema, "list")

    def _search(self) -> Tool:
        query = {
            "type": "string",
            "minLength": 2,
            "description": f"Part of the {self.entity.field(self.entity.key).label} or of any other"
            " text; case does not matter.",
        }
        schema = {
            "type": "object",
            "properties": {"query": query, "limit": LIMIT},
            "required": ["query"],
            "additionalProperties": False,
        }
        text = f"Find {self.many} by text when the id is not known."
        return self._tool(f"search_{self.entity.plural}", text, schema, "search")

    def _count(self) -> Tool:
        return self._tool(
            f"count_{self.entity.plural}",
            f"Count {self.many}, all or those that match every filter.",
            self._filtered(),
            "count",
        )

    def _filtered(self) -> Schema:
        filters = {"type": "object", "properties": self._filters(), "additionalProperties": False}
        filters["description"] = f"What the {self.many} must have in common."
        schema = {"type": "object", "properties": {"filters": filters}}
        return {**schema, "additionalProperties": False}

    def _create(self) -> Tool:
        operation = self.entity.created
        schema = object_schema([field for field in self.entity.fields if not field.initial])
        if operation.confirm:
            schema["properties"]["confirmed"] = CONFIRMED
        text = operation.text or f"Add a new {self.one}: {self.entity.text}."
        name = f"{self.entity.creates}_{self.entity.name}"
        return self._tool(name, text, schema, "create", operation=operation)

    def _update(self) -> Tool:
        changes = object_schema([dataclasses.replace(f, optional=True) for f in self.changeable()])
        changes |= {"minProperties": 1, "description": "The fields to change, with new values."}
        schema = self._on_one(Operation(""), {"changes": changes}, ["changes"])
        text = f"Correct what is stored of a {self.one}. Its state changes by other tools only."
        return self._tool(f"update_{self.entity.name}", text, schema, "update")

    def changeable(self) -> list[Field]:
        """Fields that `update` may change."""
        return [field for field in self.entity.fields if not (field.fixed or field.initial)]

    def _delete(self) -> Tool:
        operations = [one for one in self.entity.operations if one.kind == "delete"]
        operation = operations[0] if operations else Operation("delete", confirm=True)
        text = operation.text or f"Remove a {self.one} for good. Refused while others refer to it."
        schema = self._on_one(operation, {"reason": REASON}, [])
        name = f"delete_{self.entity.name}"
        return self._tool(name, text, schema, "delete", operation=operation)

    def _related(self) -> Iterator[Tool]:
        for field in self.entity.fields:
            if field.kind == "ref":
                target = field.target.replace("_", " ")
                schema = {
                    "type": "object",
                    "properties": {field.name: field_schema(field), "limit": LIMIT},
                    "required": [field.name],
                    "additionalProperties": False,
                }
                role = "" if field.name == f"{field.target}_id" else f" as {field.label}"
                suffix = "" if not role else f"_as_{field.name.removesuffix('_id')}"
                yield self._tool(
                    f"list_{field.target}_{self.entity.plural}{suffix}",
                    f"List the {self.many} that belong to one {target}{role}.",
                    schema,
                    "related",
                    field=field.name,
                    id_name=field.name,
                )

    def _move(self, operation: Operation) -> Iterator[Tool]:
        schema = self._on_one(operation, {"reason": REASON}, [])
        text = operation.text or f"Set the {self.one} to {operation.after}."
        text += f" Only while it is {' or '.join(operation.before)}."
        if operation.role:
            text += f" Needs the role {operation.role}."
        name = f"{operation.names[0]}_{self.entity.name}"
        yield self._tool(name, text, schema, "move", operation=operation)

    def _amount(self, field: Field) -> Schema:
        unit = "in dollars" if field.kind == "money" else "a whole number"
        schema: Schema = {"description": f"How much, {unit}; more than 0."}
        return schema | (
            {"type": "number", "exclusiveMinimum": 0}
            if field.kind == "money"
            else {"type": "integer", "minimum": 1}
        )

    def _adjust(self, operation: Operation) -> Iterator[Tool]:
        field = self.entity.field(operation.field)
        for name, sign in zip(operation.names, (1, -1), strict=False):
            done = "Add to" if sign > 0 else "Take from"
            text = f"{done} the {field.label} of a {self.one}."
            text += "" if sign > 0 else " Refused where it would fall below 0."
            text += f" Needs the role {operation.role}." if operation.role else ""
            properties = {"amount": self._amount(field), "reason": REASON}
            schema = self._on_one(operation, properties, ["amount"])
            more = {"operation": operation, "field": field.name, "sign": sign}
            yield self._tool(name, text, schema, "adjust", **more)

    def _transfer(self, operation: Operation) -> Iterator[Tool]:
        field = self.entity.field(operation.field)
        ends = {
            f"{side}_{self.id_name}": {
                "type": "string",
                "description": f"Id of the {self.one} {w}.",
            }
            for side, w in (("from", "that gives"), ("to", "that receives"))
        }
        properties = {**ends, "amount": self._amount(field)}
        properties |= {"confirmed": CONFIRMED} if operation.confirm else {}
        schema = {
            "type": "object",
            "properties": properties,
            "required": [*ends, "amount"],
            "additionalProperties": False,
        }
        text = operation.text or f"Move {field.label} from one {self.one} to another."
        more = {"operation": operation, "field": field.name, "id_name": next(iter(ends))}
        yield self._tool(operation.names[0], text, schema, "transfer", **more)

    def _assign(self, operation: Operation) -> Iterator[Tool]:
        field = self.entity.field(operation.field)
        properties = {field.name: field_schema(field), "reason": REASON}
        schema = self._on_one(operation, properties, [field.name])
        text = operation.text or f"Hand a {self.one} to another {field.label}."
        more = {"operation": operation, "field": field.name}
        yield self._tool(operation.names[0], text, schema, "assign", **more)

    def _total(self, operation: Operation) -> Iterator[Tool]:
        label = self.entity.field(operation.field).label
        yield self._tool(
            f"total_{self.entity.name}_{operation.field}",
            operation.text or f"Add up the {label} of {self.many}, all or those that match.",
            self._filtered(),
            "total",
            field=operation.field,
        )

    def _tags(self, operation: Operation) -> Iterator[Tool]:
        tag = {"type": "string", "pattern": "^[a-z0-9-]+$", "maxLength": 30}
        tag["description"] = "One short label in lower case, like follow-up."
        schema = self._on_one(operation, {"tag": tag}, ["tag"])
        for kind, name, text in (
            ("tag", f"tag_{self.entity.name}", f"Put a label on a {self.one}."),
            ("untag", f"untag_{self.entity.name}", f"Take a label off a {self.one}."),
        ):
            yield self._tool(name, text, schema, kind, field="tags")

    def _notes(self, operation: Operation) -> Iterator[Tool]:
        note = {"type": "string", "minLength": 1, "maxLength": 400, "description": "What to note."}
        schema = self._on_one(operation, {"text": note}, ["text"])
        text = f"Leave a note of the staff on a {self.one}; its owner does not see it."
        yield self._tool(f"add_{self.entity.name}_note", text, schema, "note", field="notes")
