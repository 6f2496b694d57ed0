"""Schemas of the kinds that acceptance suites for K2 servers send: every call matches its own."""

import json

import jsonschema
import numpy as np
import pytest
from acceptance_schemas import ALL
from drive import BYTES, draw, tool

from k2jax.constrain import make_constraint

ARGUMENTS, END = "<|tool_call_argument_begin|>", "<|tool_call_end|>"


@pytest.mark.parametrize("number", range(len(ALL)))
def test_calls_match_their_schema_from_the_fewest_tokens_upward(number):
    schema = ALL[number]
    least = make_constraint(BYTES, tools=[tool(schema)], tool_choice="required").least
    for seed, more in enumerate((0, 7, 150)):
        constraint = make_constraint(BYTES, tools=[tool(schema)], tool_choice="required")
        ids = draw(constraint, least + more, np.random.default_rng(seed))
        assert ids[-1] in BYTES.stops
        calls = BYTES.decode(ids).split(ARGUMENTS)[1:]
        assert calls
        for call in calls:
            jsonschema.validate(json.loads(call.partition(END)[0]), schema)
