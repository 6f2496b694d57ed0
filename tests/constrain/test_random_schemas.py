"""Random tokens that a constraint allows are valid JSON of a random schema, and end in time."""

import json

import jsonschema
import numpy as np
import pytest
from drive import BYTES, draw, load_kimi, tool
from random_schemas import random_schema

from k2jax.config import ConfigError
from k2jax.constrain import make_constraint
from k2jax.text.reply import parse

NAME = "maps.find-way"


def check(tokenizer, seed, further):
    """Draw one answer with `further` tokens more than the least; False: the schema is refused."""
    schema, rng = random_schema(seed), np.random.default_rng(seed)
    options = {"tools": [tool(schema, NAME)], "tool_choice": "required", "first_index": 2}
    try:
        made = make_constraint(tokenizer, **options)
    except ConfigError:
        return False
    with pytest.raises(ConfigError, match=f"has {made.least} tokens"):
        make_constraint(tokenizer, **options).start(made.least - 1)
    out = draw(made, made.least + further, rng, tokenizer.stops)
    assert out[-1] in tokenizer.stops, seed
    calls = parse(tokenizer, out).calls
    assert [c.id for c in calls] == [f"functions.{NAME}:{2 + i}" for i in range(len(calls))]
    assert calls and all(c.complete for c in calls)
    for one in calls:
        jsonschema.validate(json.loads(one.arguments), schema)
    return True


def further_tokens(seed):
    rng = np.random.default_rng(1000 + seed)
    return int(rng.choice([0, 0, 1, rng.integers(2, 20), rng.integers(20, 300)]))


def test_calls_are_valid_and_end_in_time_with_a_vocabulary_of_bytes():
    assert sum(check(BYTES, seed, further_tokens(seed)) for seed in range(20)) > 16


def test_calls_are_valid_and_end_in_time_with_kimis_vocabulary():
    kimi = load_kimi()
    assert sum(check(kimi, seed, further_tokens(seed)) for seed in range(12)) > 9


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_500_random_schemas_with_kimis_vocabulary(part):
    kimi = load_kimi()
    seeds = range(100 * part, 100 * part + 100)
    assert sum(check(kimi, seed, further_tokens(seed)) for seed in seeds) > 95
