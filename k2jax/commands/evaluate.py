"""`k2jax evaluate`: how well a model predicts text it has not seen.

JAX is imported when there is something to compute, so that help and mistakes answer at once.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from k2jax.config import ConfigError

if TYPE_CHECKING:
    from k2jax.data import Store
    from k2jax.model import Model

LONGEST = 4_096  # tokens of a row on the command line, where the model's context is longer


def texts(path: str) -> list[str]:
    """What to score at `path`: every document; of the standard library the held-out modules.

    Raises:
        ConfigError: nothing there; the message has the nearest name.
    """
    from k2jax.data import sources

    source = sources.find(path)
    kept = set(sources.split(source).heldout) if source.title == sources.STDLIB else None
    return [text for name, text in source.documents() if kept is None or name in kept]


def heldout(path: str, model: "Model") -> "Store":
    """What a folder of tokens (`k2jax data`) holds out.

    Raises:
        ConfigError: the folder is damaged, or was not made with the model's tokenizer.
    """
    from k2jax.data.token_folder import open_tokens
    from k2jax.text.kimi_tokenizer import Tokenizer

    opened = open_tokens(path)
    mine = model.tokenizer
    if not isinstance(mine, Tokenizer) or mine.digest() != opened.manifest.tokenizer:
        raise ConfigError(f"{path} was made with another tokenizer than the model's")
    return opened.heldout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax evaluate`."""
    parser.add_argument("checkpoint", help="a run's folder, a checkpoint, or a published folder")
    parser.add_argument(
        "--data", default="", metavar="FILE", help="text to score, all of it, or a folder of"
        " tokens: what it holds out; default: the modules of Python's standard library that"
        " training leaves out",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=int, default=0, metavar="N", help="tokens between overlapping windows;"
        " default: no overlap",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows at once; default: 8")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def main(args: argparse.Namespace) -> int:
    """Print the scores, and what gzip and xz need for the same text; the exit code."""
    from k2jax.data.token_folder import holds_tokens

    documents = [] if holds_tokens(args.data) else texts(args.data)
    from k2jax.data import compressors
    from k2jax.evals.perplexity import score
    from k2jax.runtime import backend as startup
    from k2jax.weights.source import load

    startup.prepare()
    model = load(args.checkpoint)
    context = min(model.config.context, LONGEST)
    if documents:
        result = score(model, documents, args.rows, context, args.stride)
    else:
        store = heldout(args.data, model)
        result = score(model, store, args.rows, context, args.stride)
        assert model.tokenizer, "heldout compared it"
        documents = list(store.texts(model.tokenizer))
    for name, bits in compressors(documents).items():
        result[f"{name}_bits_per_byte"] = bits
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return 0
    sys.stdout.write(
        f"{result['bits_per_byte']:.4f} bits per byte"
        f" (gzip -9: {result['gzip_bits_per_byte']:.4f}, xz -9: {result['xz_bits_per_byte']:.4f})\n"
        f"{result['nats_per_token']:.4f} nats per token, perplexity {result['perplexity']:.2f}\n"
        f"{result['tokens']} tokens, {result['bytes']} bytes in {result['seconds']:.1f} s\n"
    )
    return 0
