"""What is refused, and how."""

import subprocess
import sys

import pytest
from drive import BYTES, tool

from k2jax.config import ConfigError
from k2jax.constrain import make_constraint
from k2jax.constrain.json_schema import close_objects
from k2jax.text.kimi_tokenizer import Tokenizer

ANY = {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "auot"}, "tool_choice is 'auot'; did you mean 'auto'"),
        ({"tool_choice": {"type": "function"}}, "an object with a function's name"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "get_whether"}}},
            "did you mean 'get_weather'",
        ),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [tool(ANY), tool(ANY)]}, "two tools are called 'get_weather'"),
        ({"tools": [tool([1])]}, "parameters must be a JSON schema"),
        ({"tools": [tool({"not": {}})]}, r"tools\[0\].function 'get_weather': .* keyword not;"),
        ({"tools": [tool({"properties": {"a": {"$ref": "#/x"}}})]}, "'get_weather': Pointer"),
        ({"tools": [tool({"properties": {"a": 3}})]}, "'get_weather': "),
        ({"response_format": {"type": "json"}}, "response_format.type is 'json'"),
        ({"response_format": {"type": "json_schema"}}, "an object with a 'schema'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 7}}},
            "response_format: the schema must be an object",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "f"}}}},
            "response_format: Invalid type: f",
        ),
    ],
)
def test_a_wrong_field_is_refused_in_one_line_that_names_it(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_constraint(BYTES, **{"tools": [tool(ANY)], **fields})
    assert "\n" not in str(error.value)


def test_a_schema_cannot_loosen_the_rules():
    """Options of llguidance in a schema would allow endless white space or skip keywords."""
    schema = {**ANY, "x-guidance": {"whitespace_pattern": "[ ]*", "lenient": True}, "not": {}}
    with pytest.raises(ConfigError, match="keyword not"):
        make_constraint(BYTES, tools=[tool(schema)])


def test_objects_that_list_their_properties_are_closed():
    schema = {"properties": {"a": {"items": {"properties": {}}}}, "additionalProperties": True}
    closed = {"items": {"properties": {}, "additionalProperties": False}}
    assert close_objects(schema) == {"properties": {"a": closed}, "additionalProperties": True}
    composed = {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    assert close_objects(composed) == composed


def test_calls_need_the_control_tokens():
    plain = Tokenizer(BYTES.ranks, {267: "[A]", 268: "[B]", 269: "[C]", 270: "[D]", 271: "[E]"})
    with pytest.raises(ConfigError, match="calls need a tokenizer with"):
        make_constraint(plain, tools=[tool(ANY)])


def test_a_missing_package_is_one_line():
    code = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from k2jax.constrain.vocabulary import import_llguidance\n"
        "from k2jax.config import ConfigError\n"
        "try: import_llguidance()\n"
        "except ConfigError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'k2jax[serve]'" in run.stdout
