"""Random JSON schemas of what llguidance compiles, for claims about all of them."""

import random

WORDS = (
    "city",
    "unit",
    "date",
    "user_id",
    "tags",
    "query",
    "limit",
    "käse",
    "a",
    "filter-by",
    "x.y",
)
PATTERNS = (
    "^[a-z]{3}-[0-9]{2,4}$",
    "^(foo|barbaz)+$",
    "^[A-Z][a-z]*( [A-Z][a-z]*)*$",
    "[0-9]$",
    "^\\+?[0-9]{7,15}$",
    "^(0|1{8})$",
    "^\\w+@\\w+\\.com$",
)
FORMATS = ("date", "time", "date-time", "email", "ipv4", "uuid", "hostname", "uri", "duration")


def random_schema(seed):
    """A schema of an object; the same for the same seed."""
    return Maker(random.Random(seed)).make()


class Maker:
    def __init__(self, rng):
        self.rng = rng
        self.defs = {}

    def chance(self, share):
        return self.rng.random() < share

    def make(self):
        if self.chance(0.2):
            self.defs["Node"] = {
                "type": "object",
                "properties": {"value": self.scalar(), "next": {"$ref": "#/$defs/Node"}},
                "required": ["value"],
            }
        if self.chance(0.2):
            self.defs["Tree"] = {
                "type": "object",
                "properties": {
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/Tree"}},
                    "name": self.string(),
                },
                "required": ["kids"],
            }
        schema = self.object(0)
        return schema | {"$defs": self.defs} if self.defs else schema

    def value(self, depth):
        if self.defs and self.chance(0.15):
            return {"$ref": f"#/$defs/{self.rng.choice(sorted(self.defs))}"}
        if depth >= 3 or self.chance(0.55):
            return self.scalar()
        return self.rng.choice((self.object, self.object, self.array, self.union, self.all_of))(
            depth
        )

    def scalar(self):
        kinds = (self.string, self.string, self.number, self.integer, self.enum, self.other)
        return self.rng.choice(kinds)()

    def string(self):
        schema = {"type": "string"}
        if self.chance(0.2):
            return schema | {"pattern": self.rng.choice(PATTERNS)}
        if self.chance(0.15):
            return schema | {"format": self.rng.choice(FORMATS)}
        if self.chance(0.3):
            schema["minLength"] = self.rng.choice((1, 2, 5, 17, 40))
        if self.chance(0.3):
            schema["maxLength"] = schema.get("minLength", 0) + self.rng.choice((0, 1, 4, 30))
        return schema

    def number(self):
        schema = {"type": "number"}
        if self.chance(0.3):
            schema["minimum"] = self.rng.choice((-1.5, 0, 3, 100))
        if self.chance(0.3):
            schema["maximum"] = schema.get("minimum", 0) + self.rng.choice((1, 12.5, 1000))
        return schema

    def integer(self):
        schema = {"type": "integer"}
        if self.chance(0.3):
            schema["minimum"] = self.rng.choice((-10, 0, 1, 7, 1990))
        if self.chance(0.3):
            schema["maximum"] = schema.get("minimum", 0) + self.rng.choice((1, 9, 130))
        if self.chance(0.1):
            return {"type": "integer", "multipleOf": self.rng.choice((2, 5, 7))}
        return schema

    def enum(self):
        if self.chance(0.2):
            return {"const": self.rng.choice(("fixed", 7, None, True))}
        values = ["celsius", "fahrenheit", "K", 'quo"te', "zwölf", "a/b\\c", 3, 2.5, None, False]
        return {"enum": self.rng.sample(values, self.rng.randint(1, 6))}

    def other(self):
        return self.rng.choice(
            ({"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {})
        )

    def object(self, depth):
        names = self.rng.sample(WORDS, self.rng.randint(0, 5))
        schema = {"type": "object", "properties": {name: self.value(depth + 1) for name in names}}
        schema["required"] = [name for name in names if self.chance(0.5)]
        if self.chance(0.4):
            schema["additionalProperties"] = False
        elif self.chance(0.2):
            schema["additionalProperties"] = self.scalar()
        elif self.chance(0.2):
            schema["additionalProperties"] = True
        if self.chance(0.05):
            return {"type": "object", "patternProperties": {"^[a-z]{2}_": self.scalar()}}
        return schema

    def array(self, depth):
        schema = {"type": "array", "items": self.value(depth + 1)}
        if self.chance(0.4):
            schema["minItems"] = self.rng.randint(1, 3)
        if self.chance(0.3):
            schema["maxItems"] = schema.get("minItems", 0) + self.rng.randint(0, 3)
        if self.chance(0.1):
            return {"type": "array", "prefixItems": [self.scalar(), self.scalar()], "minItems": 2}
        return schema

    def union(self, depth):
        if self.chance(0.3):
            return {"anyOf": [self.value(depth + 1), {"type": "null"}]}
        if self.chance(0.4):
            branches = []
            for kind in ("circle", "sq"):
                body = self.object(depth + 1)
                properties = {"kind": {"const": kind}, **body.get("properties", {})}
                required = ["kind", *body.get("required", ())]
                branches.append({"type": "object", "properties": properties, "required": required})
            return {self.rng.choice(("oneOf", "anyOf")): branches}
        return {"anyOf": [self.value(depth + 1) for _ in range(self.rng.randint(2, 3))]}

    def all_of(self, depth):
        first = {"type": "object", "properties": {"left": self.scalar()}, "required": ["left"]}
        second = {"type": "object", "properties": {"right": self.value(depth + 1)}}
        return {"allOf": [first, second]}
