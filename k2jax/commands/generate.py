"""`k2jax generate`: continue prompts, or answer a conversation.

JAX is imported when there is something to compute, so that help and mistakes answer at once.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2jax.commands import loading
from k2jax.config import ConfigError, nearest
from k2jax.text.unicode import replace_surrogates

if TYPE_CHECKING:
    from k2jax.inference.request import EngineStats
    from k2jax.text.interface import TokenizerLike


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax generate`."""
    loading.add_arguments(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="repeat it for several"
    )
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is what a user says; print the answer"
    )
    parser.add_argument(
        "--messages",
        metavar="FILE",
        help="answer a conversation: JSON, a list of messages or {messages, tools}",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="share of probability to draw from"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def main(args: argparse.Namespace) -> int:
    """Print every prompt with its continuation, or the answers; the exit code."""
    # Bytes of the command line that are no UTF-8 come as halves of surrogate pairs.
    args.prompt = [replace_surrogates(prompt) for prompt in args.prompt]
    talks = conversations(args)
    mesh = loading.read_mesh(args)

    from k2jax.inference.generate import check_prompts, continue_all, make_requests, take_ids
    from k2jax.inference.request import Sampling
    from k2jax.model import Model
    from k2jax.text.kimi_template import encode

    with loading.opened(args, mesh, inference=True) as (group, source):
        tokenizer = source.tokenizer
        if tokenizer is None:
            raise ConfigError(f"{args.checkpoint} has no tokenizer; k2jax.generate takes token ids")
        prompts = [encode(tokenizer, *talk) for talk in talks] or args.prompt
        request = prompts, args.max_new_tokens, args.temperature, args.top_p
        # Before the weights are read, which takes longest.
        rows = check_prompts(Model(source.config, {}, tokenizer), *request)
        group.require_equal("prompts", {"token ids": _digest(rows)})
        model = source.load(args.dtype, args.weights)
        reports: list[EngineStats] = []
        sampling = Sampling(args.temperature, args.top_p, seed=args.seed)
        requests = make_requests(model, rows, args.max_new_tokens, sampling)
        began = time.perf_counter()
        new_ids = take_ids(continue_all(model, requests, reports.append))
        summary = {"seconds": round(time.perf_counter() - began, 3)}
        for stats in reports:  # of process 0
            summary |= summarise(stats)
            sys.stdout.write(render(args, tokenizer, prompts, new_ids, summary) + "\n")
    return 0


def _digest(rows: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]


def summarise(stats: "EngineStats") -> dict[str, int]:
    """What the engine did: its steps, and how far an MTP layer saved some."""
    numbers = {"steps": stats.steps_total, "new_tokens": stats.new_tokens_total}
    if stats.drafted_tokens_total:
        numbers["drafted_tokens"] = stats.drafted_tokens_total
        numbers["accepted_tokens"] = stats.accepted_tokens_total
    return numbers


def render(
    args: argparse.Namespace,
    tokenizer: "TokenizerLike",
    prompts: list[Any],
    new_ids: list[list[int]],
    summary: dict[str, Any],
) -> str:
    """What is printed: text, or one JSON object."""
    from k2jax.text.reply import parse

    texts = [tokenizer.decode(ids) for ids in new_ids]
    asked = args.prompt or [args.messages]
    replies = bool(args.chat or args.messages)
    if not args.json:
        before = [""] * len(texts) if replies else asked
        return "\n---\n".join(prompt + text for prompt, text in zip(before, texts, strict=True))
    samples: list[dict[str, Any]] = [
        {"prompt": prompt, "text": text, "ids": ids}
        for prompt, text, ids in zip(asked, texts, new_ids, strict=True)
    ]
    for sample, prompt in zip(samples if replies else [], prompts, strict=False):
        sample["message"] = parse(tokenizer, sample["ids"], prompt).message()
    return json.dumps({"samples": samples} | summary)


Conversation = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def conversations(args: argparse.Namespace) -> list[Conversation]:
    """Messages and tools of each answer that is asked for; none: prompts are to be continued.

    Raises:
        ConfigError: options that exclude each other, or a file without well-formed messages.
    """
    if bool(args.prompt) == bool(args.messages):
        raise ConfigError("generate needs --prompt TEXT or --messages FILE, one of them")
    if not args.messages:
        said = args.prompt if args.chat else []
        return [([{"role": "user", "content": prompt}], []) for prompt in said]
    if args.chat:
        raise ConfigError("--chat has no effect with --messages")
    return [read_conversation(args.messages)]


def read_conversation(file: str) -> Conversation:
    """Messages and tools in a JSON file, checked.

    Raises:
        ConfigError: it is missing or malformed; one line says how.
    """
    from k2jax.text.messages import check_messages, check_tools
    from k2jax.text.unicode import replace_surrogates_in

    try:
        content = replace_surrogates_in(json.loads(Path(file).read_text("utf-8-sig")))
    except FileNotFoundError:
        raise ConfigError(f"no file {file}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{file} is not readable JSON: {error}") from None
    if isinstance(content, list):
        content = {"messages": content}
    known = ("messages", "tools")
    if not isinstance(content, dict) or "messages" not in content:
        raise ConfigError(f"{file} must hold a list of messages, or an object with 'messages'")
    if other := [key for key in content if key not in known]:
        raise ConfigError(f"{file} has {other[0]!r}; {nearest(other[0], known)}")
    try:
        tools = content.get("tools")
        return check_messages(content["messages"]), check_tools([] if tools is None else tools)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
