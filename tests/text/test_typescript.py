"""Tools as K2.5 reads them. Expected texts are written out by the published rules."""

import pytest

from k2jax.text.typescript import declare_tools, sort_keys


def tool(parameters, name="f", **function):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **function}}


def types(properties, **schema):
    """The lines between `type f = (_: {` and `}) => any;`."""
    text = declare_tools([tool({"type": "object", "properties": properties, **schema})])
    start, end = "namespace functions {\ntype f = (_: {\n", "\n}) => any;\n}\n"
    assert text is not None and text.startswith("# Tools\n\n## functions\n" + start), text
    assert text.endswith(end)
    return text.partition(start)[2].removesuffix(end)


def test_a_whole_declaration():
    weather = tool(
        {
            "type": "object",
            "properties": {
                "unit": {"enum": ["C", "F"], "type": "string", "default": "C"},
                "city": {"type": "string", "description": "Where.\n\nAny town.", "minLength": 2},
                "days": {"type": "integer", "minimum": 1, "maximum": 7, "default": 1},
            },
            "required": ["city"],
        },
        "weather",
        description="Forecast of\na town.",
    )
    plugin = {"type": "_plugin", "function": {"name": "left out"}}
    assert declare_tools([weather, plugin, tool({}, "now")]) == (
        "# Tools\n\n## functions\nnamespace functions {\n// Forecast of\n// a town.\n"
        "type weather = (_: {\n  // Where.\n\n  // Any town.\n  // minLength: 2\n  city: string,\n"
        "  // maximum: 7, minimum: 1\n  // Default: 1\n  days?: number,\n"
        '  // Default: "C"\n  unit?: "C" | "F"\n}) => any;\ntype now = (_: {}) => any;\n}\n'
    )


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "boolean"}, "boolean"),
        ({"type": "integer"}, "number"),
        ({}, "any"),
        (True, "any"),
        (False, "null"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"type": ["object", "array", "integer"]}, "{} | Array<any> | number"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string | null"),
        ({"enum": [1, None, "a", True]}, '1 | None | "a" | True'),
        ({"enum": ["a", None], "type": ["null", "string"]}, '"a" | None'),
        ({"type": "array"}, "Array<any>"),
        (
            {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
            "Array<Array<number>>",
        ),
        ({"type": "object"}, "{}"),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            "{\n    [k: string]: number\n  }",
        ),
        (
            {"type": "object", "additionalProperties": False, "properties": {"a": {}}},
            "{\n    a?: any,\n    [k: string]: never\n  }",
        ),
        (
            {"type": "array", "items": {"type": "string", "description": "one", "maxLength": 3}},
            "Array<\n    // one\n    // maxLength: 3\n    string\n  >",
        ),
    ],
)
def test_every_kind_of_schema(schema, said):
    assert types({"x": schema}, required=["x"]) == f"  x: {said}"


def test_required_ones_first_each_by_name_and_defaults_as_python_writes_them():
    found = types(
        {
            "b": {"type": "boolean", "default": False},
            "a": {"type": "object", "default": {"k": "\u6f22"}},
            "d": {"type": "string"},
            "c": {"type": "array", "minItems": 1},
        },
        required=["d", "c"],
        additionalProperties=True,
    )
    assert found == (
        '  // minItems: 1\n  c: Array<any>,\n  d: string,\n  // Default: {"k": "\u6f22"}\n'
        "  a?: {},\n  // Default: False\n  b?: boolean,\n  [k: string]: any"
    )


def test_definitions_become_interfaces_and_a_tree_names_itself():
    node = {"type": "object", "properties": {"v": {"type": "number"}}, "description": "A node."}
    schema = {
        "$defs": {"Node": node, "Word": {"type": "string", "minLength": 1}},
        "properties": {"n": {"$ref": "#/$defs/Node"}, "up": {"$ref": "#"}},
        "required": ["n"],
    }
    assert declare_tools([tool(schema)]) == (
        "# Tools\n\n## functions\nnamespace functions {\n"
        "interface parameters {\n  n: Node,\n  up?: parameters\n}\n"
        "// A node.\ninterface Node {\n  v?: number\n}\ninterface Word string\n"
        "type f = (_: parameters) => any;\n}\n"
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/Missing"},
        {"$ref": "http://x"},
        {"title": "of no kind"},
        {"oneOf": [{"type": "string"}]},
        {"enum": [1], "type": "string"},
        {"enum": ["a"], "type": ["string", "integer"]},
        {"type": ["string", "tuple"]},
        {"type": "object", "properties": ["a"]},
        "string",
    ],
)
def test_what_has_no_such_form_is_left_to_json(schema):
    assert declare_tools([tool({"properties": {"x": schema}})]) is None


def test_nothing_is_said_of_nothing():
    assert declare_tools([]) is None


def test_keys_are_put_in_order_at_every_depth():
    mixed = [{"b": 1, "a": [{"d": 1, "c": {"z": 1, "y": 2}}]}]
    assert repr(sort_keys(mixed)) == "[{'a': [{'c': {'y': 2, 'z': 1}, 'd': 1}], 'b': 1}]"
