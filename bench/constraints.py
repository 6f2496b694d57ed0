"""Microseconds that a constraint costs per token, with Kimi's vocabulary; prints one JSON line.

    python bench/constraints.py FOLDER     # of a tiktoken.model

For each set of tools an answer is followed token by token: the mask is asked for, then the answer's
token is accepted, as an engine does. `us` is processor time per token with 4,096 tokens to come and
`us_256` with 256. `us_near` has 8 tokens more than the answer, where each token is searched for.
`compile_ms` is paid once per schema.
"""

import json
import sys
import time

from k2jax.constrain import make_constraint
from k2jax.constrain.json_schema import _compile
from k2jax.constrain.vocabulary import open_vocabulary
from k2jax.text.kimi_tokenizer import Tokenizer

STRING, NUMBER = {"type": "string"}, {"type": "number"}
CITY = {
    "type": "object",
    "properties": {"city": STRING, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city"],
}
ORDER = {
    "type": "object",
    "properties": {
        "customer": {
            "type": "object",
            "properties": {"name": STRING, "email": STRING, "vip": {"type": "boolean"}},
            "required": ["name", "email"],
        },
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                    "note": {"anyOf": [STRING, {"type": "null"}]},
                },
                "required": ["sku", "count"],
            },
            "minItems": 1,
        },
        "ship_on": {"type": "string", "format": "date"},
    },
    "required": ["customer", "items"],
}
SEARCH = {
    "type": "object",
    "properties": {
        "query": STRING,
        "limit": {"type": "integer", "minimum": 1, "maximum": 50},
        "site": STRING,
        "after": STRING,
        "tags": {"type": "array", "items": STRING},
    },
    "required": ["query"],
}
ANSWERS = {
    "weather": (
        [("get_weather", CITY)],
        ("get_weather", {"city": "San Francisco, California", "unit": "celsius"}),
    ),
    "search": (
        [("web.search", SEARCH), ("get_weather", CITY), ("open", CITY)],
        (
            "web.search",
            {
                "query": "how many parameters does the largest open mixture of experts have",
                "limit": 10,
                "tags": ["models", "open weights", "2026"],
            },
        ),
    ),
    "order": (
        [("place-order", ORDER), ("get_weather", CITY), ("web.search", SEARCH)],
        (
            "place-order",
            {
                "customer": {"name": "Ana Müller", "email": "ana@example.org", "vip": False},
                "items": [
                    {"sku": "ABC-1234", "count": 2, "note": "wrap it as a present, please"},
                    {"sku": "XYZ-0001", "count": 12, "note": None},
                ],
                "ship_on": "2026-12-01",
            },
        ),
    ),
    "json_object": ([], ("", {"a": [1, 2, {"b": "some longer text than that"}], "c": None})),
}


def measure(tokenizer, name, tokens):
    """Microseconds a token, and the answer's tokens."""
    tools, (called, value) = ANSWERS[name]
    text = json.dumps(value, ensure_ascii=False)
    if called:
        text = (
            f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{called}:0"
            f"<|tool_call_argument_begin|>{text}<|tool_call_end|><|tool_calls_section_end|>"
        )
    ids = tokenizer.encode(text + "<|im_end|>", special=True)
    listed = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in tools]
    kind = {"tools": listed, "tool_choice": "required"}
    kind = kind if called else {"response_format": {"type": "json_object"}}
    best = float("inf")
    for _ in range(5):
        made = make_constraint(tokenizer, **kind)
        made.start(tokens or len(ids) + 8)
        began = time.process_time()
        for token in ids:
            made.mask()
            made.accept(token)
        best = min(best, time.process_time() - began)
    return round(1e6 * best / len(ids), 1), len(ids)


def main():
    """Measure every set of tools."""
    tokenizer = Tokenizer.load(sys.argv[1])
    began = time.process_time()
    _ = open_vocabulary(tokenizer).ll_tokenizer
    out = {"vocabulary": tokenizer.vocab, "open_s": round(time.process_time() - began, 2)}
    for name in ANSWERS:
        _compile.cache_clear()
        began = time.process_time()
        measure(tokenizer, name, 4096)
        compile_ms = round(1e3 * (time.process_time() - began), 1)
        us, tokens = measure(tokenizer, name, 4096)
        out[name] = {"tokens": tokens, "us": us, "us_256": measure(tokenizer, name, 256)[0]}
        out[name] |= {"us_near": measure(tokenizer, name, 0)[0], "compile_ms": compile_ms}
    print(json.dumps(out))


if __name__ == "__main__":
    main()
