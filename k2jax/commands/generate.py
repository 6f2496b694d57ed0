"""`k2jax generate`: continue prompts, or answer a conversation.

JAX is imported when there is something to compute, so that help and mistakes answer at once.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from k2jax.config import ConfigError, nearest
from k2jax.text.unicode import replace_surrogates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax generate`."""
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint, or a published folder")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="repeat it for several"
    )
    parser.add_argument(
        "--chat", action="store_true", help="a prompt is what a user says; print the answer"
    )
    parser.add_argument(
        "--messages", metavar="FILE",
        help="answer a conversation: JSON, a list of messages or {messages, tools}",
    )  # fmt: skip
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

    from k2jax.inference.generate import generate
    from k2jax.runtime import backend as startup
    from k2jax.text.kimi_template import encode
    from k2jax.text.reply import parse
    from k2jax.weights.source import load

    startup.prepare()
    model = load(args.checkpoint)
    if model.tokenizer is None:
        raise ConfigError(f"{args.checkpoint} has no tokenizer; k2jax.generate takes token ids")
    prompts = [encode(model.tokenizer, *talk) for talk in talks] or args.prompt
    began = time.perf_counter()
    found = generate(model, prompts, args.max_new_tokens, args.temperature, args.top_p, args.seed)
    seconds = time.perf_counter() - began
    texts = [model.tokenizer.decode(ids) for ids in found]
    given = args.prompt or [args.messages]
    if args.json:
        samples = [
            {"prompt": prompt, "text": text, "ids": ids}
            for prompt, text, ids in zip(given, texts, found, strict=True)
        ]
        for sample, prompt in zip(samples if talks else [], prompts, strict=False):
            sample["message"] = parse(model.tokenizer, sample["ids"], prompt).message()
        sys.stdout.write(json.dumps({"samples": samples, "seconds": round(seconds, 3)}) + "\n")
    else:
        before = [""] * len(texts) if talks else given
        shown = (prompt + text for prompt, text in zip(before, texts, strict=True))
        sys.stdout.write("\n---\n".join(shown) + "\n")
    return 0


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
