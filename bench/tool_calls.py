"""How often a served model makes the right tool call, on conversations of `k2jax synth`.

    k2jax synth runs/agentic --tasks 500 --tools 6
    k2jax synth runs/agentic-other --tasks 100 --tools 6 --seed 1
    python bench/tool_calls.py URL runs/agentic-other --trained runs/agentic

At each turn where the oracle calls one tool, the model reads the conversation up to there and
writes the next message. Prints one line of JSON: shares of turns where it called a tool, the
oracle's tool, that tool with arguments that fit its schema, and with the oracle's arguments.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError
from k2jax.post.synthesis.check_arguments import describe_mistake
from k2jax.post.synthesis.endpoint import parse_endpoint
from k2jax.post.synthesis.rubric import is_same
from k2jax.post.synthesis.stored import read_lines

MOST = 120  # tokens of an answer; the oracle's calls have fewer


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="http://HOST:PORT/v1, or with #MODEL")
    parser.add_argument("folder", help="that k2jax synth made")
    parser.add_argument("--trained", default="", help="only tools that are called in this folder")
    parser.add_argument("--turns", type=int, default=100, help="at most")
    parser.add_argument("--first", action="store_true", help="only the first call of each")
    args = parser.parse_args()
    endpoint = dataclasses.replace(parse_endpoint(args.url, temperature=0.0), most_tokens=MOST)
    known = called_tools(args.trained) if args.trained else None
    counts = dict.fromkeys(("called", "right_tool", "valid", "same_arguments"), 0)
    turns = too_long = 0
    for messages, tools, wanted in find_turns(args.folder, args.first):
        if turns == args.turns:
            break
        if known is not None and wanted["name"] not in known:
            continue
        try:
            message = endpoint.ask(messages, tools)
        except ConfigError:  # the context has no room
            too_long += 1
            continue
        turns += 1
        for name in grade(message, tools, wanted):
            counts[name] += 1
    shares = {name: round(count / max(turns, 1), 4) for name, count in counts.items()}
    print(json.dumps({"bench": "tool_calls", "turns": turns, "too_long": too_long, **shares}))


def called_tools(folder: str) -> set[str]:
    """Names of tools that a folder's conversations call."""
    return {wanted["name"] for _, _, wanted in find_turns(folder, False)}


def find_turns(folder: str, first: bool) -> Iterator[tuple[list[Any], list[Any], dict[str, Any]]]:
    """Yield what precedes each single call, the tools, and the call's function."""
    path = Path(folder) / "conversations.jsonl"
    for line in read_lines(path, ("messages", "tools")):
        for i, message in enumerate(line["messages"]):
            if len(message.get("tool_calls", ())) == 1:
                yield line["messages"][:i], line["tools"], message["tool_calls"][0]["function"]
                if first:
                    break


def grade(message: dict[str, Any], tools: list[Any], wanted: dict[str, Any]) -> list[str]:
    """Name what is right about a message."""
    calls = message.get("tool_calls") or []
    if not calls:
        return []
    function = calls[0]["function"]
    if function["name"] != wanted["name"]:
        return ["called"]
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in tools}
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return ["called", "right_tool"]
    if describe_mistake(schemas[wanted["name"]], arguments):
        return ["called", "right_tool"]
    same = is_same(arguments, json.loads(wanted["arguments"]))
    return ["called", "right_tool", "valid", *["same_arguments"] * same]


if __name__ == "__main__":
    main()
