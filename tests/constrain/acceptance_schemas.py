"""Schemas of the kinds that Moonshot's acceptance suite sends as a tool's parameters.

Its cases come from the checker of "Moonshot flavored JSON Schema": each type, references of every
kind, recursion, unions, odd names, notes that demand nothing. These are our own of the same kinds.
"""

TEXT, WHOLE, NOTHING = {"type": "string"}, {"type": "integer"}, {"type": "null"}


def members(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


def ref(path):
    return {"$ref": path}


def union(*branches):
    return {"anyOf": list(branches)}


ROOTS = [
    {},
    {"type": "object"},
    {"type": "object", "required": []},
    {"type": ["null", "object", "array", "string"]},
    TEXT,
    WHOLE,
    NOTHING,
    {"type": "number"},
    {"type": "boolean"},
    {"type": "array", "items": TEXT},
    {"type": "array", "items": {"type": "array", "items": WHOLE}},
    {"type": "string", "minLength": 2, "maxLength": 40, "pattern": "^[b-y]+$", "default": "ok"},
    {"type": "number", "minimum": -3, "maximum": 8, "enum": [0.5, 7, -2.25]},
    {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 4, "default": []},
    {"type": "string", "enum": ["", "\t", "\n", " ", "back\\slash", '"']},
    {"type": ["string", "null"], "enum": ["on", None]},
    {"enum": ["left", "right"]},
]
REFERENCES = [
    members(owner=ref("#/$defs/Person")) | {"$defs": {"Person": members(name=TEXT)}},
    members(["head"], head=ref("#/$defs/Link"))
    | {"$defs": {"Link": members(["rest"], value=WHOLE, rest=union(NOTHING, ref("#/$defs/Link")))}},
    members(one=ref("#/$defs/Ping"))
    | {"$defs": {"Ping": members(x=ref("#/$defs/Pong")), "Pong": members(y=ref("#/$defs/Ping"))}},
    # A member that must contain itself: the object goes without it.
    members(loop=ref("#/$defs/Loop"))
    | {"$defs": {"Loop": members(["on"], on=ref("#/$defs/Loop"))}},
    members(["root"], root=ref("#/$defs/Tree"))
    | {"$defs": {"Tree": members(["kids"], kids={"type": "array", "items": ref("#/$defs/Tree")})}},
    members(["label"], label=TEXT, parent=ref("#")),
    members(["node"], node=union(NOTHING, members(["next"], next=ref("#"), name=TEXT))),
    members(
        ["kind", "parts"], kind={"enum": ["box", "row"]}, parts={"items": ref("#"), "type": "array"}
    )
    | {"additionalProperties": False},
    members(first=TEXT, second=ref("#/properties/first")),
    members(many={"type": "array", "items": TEXT}, single=ref("#/properties/many/items")),
    members(
        ["step"],
        step={"type": "string", "minLength": 1},
        last={**ref("#/properties/step"), "description": "d"},
    ),
    members(id=ref("#/$defs/User/properties/id")) | {"$defs": {"User": members(id=WHOLE)}},
]
OBJECTS = [
    members(["a.b"], **{"a.b": TEXT, "c/d": union(TEXT, members(**{"e.f": WHOLE}))}),
    members(**{"": TEXT, "type": TEXT, "enum": TEXT, "items": WHOLE, "properties": TEXT}),
    members(["deep"], deep=members(["er"], er=members(["est"], est={"type": "boolean"}))),
    members(["tags"], tags={"type": ["array"], "items": {"type": ["string"]}}),
    members(["x"], x={"const": "fixed"}),
    members(["bag"], bag={"type": "object", "additionalProperties": TEXT, "minProperties": 1}),
    members(
        ["pair"],
        pair={"type": "array", "prefixItems": [TEXT, WHOLE], "items": False, "minItems": 2},
    ),
    members(
        ["n"],
        n={"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100, "multipleOf": 5},
    ),
    members(
        ["when"], when={"type": "string", "format": "date-time", "title": "t", "examples": ["now"]}
    ),
    members(["who"], who=union(members(["email"], email=TEXT), members(["phone"], phone=TEXT))),
    members(
        ["either"], either=members(a=TEXT, b=TEXT) | union({"required": ["a"]}, {"required": ["b"]})
    ),
    members(["open"], open={"type": "object"}) | {"additionalProperties": True},
    {
        **members(q=TEXT),
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://a.example/b",
    },
]
ALL = ROOTS + REFERENCES + OBJECTS
