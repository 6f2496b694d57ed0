"""Draws answers at random from what a constraint allows."""

from pathlib import Path

import pytest

from k2jax.constrain.vocabulary import list_ids
from k2jax.text.kimi_tokenizer import Tokenizer

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
NAMED = Tokenizer({bytes([i]): i for i in range(256)}, {278: "<think>", 279: "</think>"})
# Moonshot's vocabulary lies beside the project, in a folder of data for tests.
PLACES = [folder / "shared/data/kimi/tiktoken.model" for folder in Path(__file__).parents]


def tool(schema, name="get_weather"):
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def draw(constraint, tokens, rng, stops=BYTES.stops, prefer=()):
    """Start, and take random allowed tokens; those of `prefer` first, where they are allowed."""
    constraint.start(tokens)
    out = []
    while len(out) < tokens:
        allowed = list_ids(constraint.mask())
        assert len(allowed), "nothing is allowed"
        wanted = [i for i in prefer if i in allowed]
        token = wanted[0] if wanted else int(allowed[rng.integers(len(allowed))])
        out.append(token)
        constraint.accept(token)
        if token in stops:
            break
    return out


def follow(constraint, ids):
    """Take tokens one by one; each must be allowed."""
    for number, token in enumerate(ids):
        assert token in list_ids(constraint.mask()), (number, token)
        constraint.accept(token)


def load_kimi():
    file = next((place for place in PLACES if place.is_file()), None)
    if file is None:
        pytest.skip("needs Kimi's tiktoken.model in shared/data/kimi")
    return Tokenizer.load(file.parent)
