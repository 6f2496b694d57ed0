"""Single values: what is shortest, what is allowed near the end, what never is."""

import json
import time

import jsonschema
import numpy as np
import pytest
from drive import BYTES, draw, follow, load_kimi

from k2jax.config import ConfigError
from k2jax.constrain import make_constraint
from k2jax.constrain.vocabulary import list_ids, open_vocabulary

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}, "required": ["next"]}
TREE = {"anyOf": [{"type": "string", "minLength": 9}, NODE, {"const": "leaf-ending"}]}
CITY = {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}}


def make(schema, tokenizer=BYTES):
    described = {"type": "json_schema", "json_schema": {"schema": schema}}
    return make_constraint(tokenizer, response_format=described)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "string"}, '""'),
        ({"type": "string", "minLength": 3}, '"   "'),
        ({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, '"AA-000"'),
        ({"type": "string", "pattern": "needle$"}, '"needle"'),
        ({"type": "string", "format": "date"}, '"0000-01-01"'),
        ({"type": "integer", "minimum": 1234}, "1234"),
        ({"type": "integer", "multipleOf": 7, "minimum": 50}, "56"),
        ({"type": "number", "exclusiveMinimum": 9, "maximum": 10}, "10"),
        ({"enum": ["fahrenheit", "celsius", "K"]}, '"K"'),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, "[true,true]"),
        ({"type": "object", "properties": CITY, "required": ["unit"]}, '{"unit":"C"}'),
        ({"type": "object", "properties": CITY, "required": ["unit", "city"]}, None),
        ({"anyOf": [{"const": "a longer one"}, {"type": "null"}]}, "null"),
        ({"$defs": {"Node": TREE}, "$ref": "#/$defs/Node"}, '"leaf-ending"'),
        ({}, "0"),
    ],
)
def test_the_least_is_the_shortest_value_and_the_stop(schema, text):
    made, text = make(schema), text or '{"city":"","unit":"C"}'
    if "leaf" in text:
        text = '"         "'
    assert made.least == len(text) + 1
    out = draw(made, made.least, np.random.default_rng(0))
    jsonschema.validate(json.loads(BYTES.decode(out[:-1])), schema)


def test_near_the_end_any_content_of_a_plain_string_stays_allowed():
    """Nothing is lost of the vocabulary but what would not fit."""
    kimi = load_kimi()
    made = make({"type": "object", "properties": CITY, "required": ["city"]}, kimi)
    made.start(12)
    follow(made, kimi.encode('{"city":"New York'))
    assert len(list_ids(made.mask())) > 100_000


def test_a_long_string_takes_the_longest_tokens_and_any_content():
    kimi = load_kimi()
    schema = {"type": "string", "minLength": 300}
    made = make(schema, kimi)
    assert made.least < 12
    began = time.process_time()
    for seed in range(3):
        made = make(schema, kimi)
        out = draw(made, made.least + 5 * seed, np.random.default_rng(seed), kimi.stops)
        assert len(json.loads(kimi.decode(out[:-1]))) >= 300
    assert time.process_time() - began < 20


def test_no_undeclared_member_gets_a_declared_name_by_escapes():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    made = make(schema | {"additionalProperties": True})
    made.start(100)
    follow(made, list(b'{"'))
    made.accept(ord("\\"))
    assert ord("u") not in list_ids(made.mask())


def test_a_member_that_must_contain_itself_is_never_begun():
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/Node"}, "b": {}}}
    made = make(schema | {"$defs": {"Node": NODE}})
    made.start(100)
    follow(made, list(b'{"'))
    assert list_ids(made.mask()).tolist() == [ord("b")]
    with pytest.raises(ConfigError, match="response_format: "):
        make({"$defs": {"Node": NODE}, "$ref": "#/$defs/Node"})


def test_a_format_that_only_describes_is_left_out():
    for schema in ({"type": "string", "format": "int64"}, {"type": "string", "format": "path"}):
        follow(started(make(schema), 30), list(b'"x"'))
    properties = {"format": {"type": "string"}, "uniqueItems": {"type": "boolean"}}
    made = make({"type": "object", "properties": properties, "required": ["format"]})
    follow(started(made, 60), list(b'{"format": "int64", "uniqueItems": false}'))


def started(constraint, tokens):
    constraint.start(tokens)
    return constraint


def test_a_token_that_is_not_allowed_is_an_error():
    made = started(make({"type": "integer"}), 10)
    with pytest.raises(ValueError, match="not allowed"):
        made.accept(ord("x"))


def test_sequences_share_a_schema_and_nothing_else():
    first, second = make({"enum": ["a", "b"]}), make({"enum": ["a", "b"]})
    first.start(9), second.start(9)
    follow(first, list(b'"a'))
    follow(second, list(b'"b"'))
    follow(first, list(b'"'))


def test_fewest_tokens_of_a_text():
    words = open_vocabulary(load_kimi())
    for text in (b'{"city": "Paris"}', b" " * 300, "Zürich 漢字".encode(), b""):
        ids = words.split(text)
        assert b"".join(words.tokens[i] for i in ids) == text
        assert len(ids) == words.count(text)
        assert len(ids) <= len(load_kimi().encode(text.decode()))
