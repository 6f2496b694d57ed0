"""`k2jax evaluate`: how well a model predicts text it has not seen.

JAX is imported when there is something to compute, so that help and mistakes answer at once.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from k2jax.commands import loading
from k2jax.config import ConfigError

if TYPE_CHECKING:
    from k2jax.data import Store
    from k2jax.text.interface import TokenizerLike


def texts(path: str) -> list[str]:
    """What to score at `path`: every document; of the standard library the held-out modules.

    Raises:
        ConfigError: nothing there; the message has the nearest name.
    """
    from k2jax.data import sources

    source = sources.find(path)
    kept = set(sources.split(source).heldout) if source.title == sources.STDLIB else None
    return [text for name, text in source.documents() if kept is None or name in kept]


def heldout(path: str, tokenizer: "TokenizerLike | None") -> "Store":
    """What a folder of tokens (`k2jax data`) holds out.

    Raises:
        ConfigError: the folder is damaged, or was not made with the model's tokenizer.
    """
    from k2jax.data.token_folder import open_tokens
    from k2jax.text.kimi_tokenizer import Tokenizer

    opened = open_tokens(path)
    if not isinstance(tokenizer, Tokenizer) or tokenizer.digest() != opened.manifest.tokenizer:
        raise ConfigError(f"{path} was made with another tokenizer than the model's")
    return opened.heldout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax evaluate`."""
    loading.add_arguments(parser)
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
    parser.add_argument(
        "--dispatch", choices=("allgather", "alltoall"), default="", help="how tokens reach their"
        " experts on a mesh; default: what takes less memory there",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def main(args: argparse.Namespace) -> int:
    """Print the scores, and what gzip and xz need for the same text; the exit code."""
    from k2jax.data.token_folder import holds_tokens

    mesh = loading.read_mesh(args)
    documents = [] if holds_tokens(args.data) else texts(args.data)
    from k2jax.evals.perplexity import check_request, score

    with loading.opened(args, mesh) as (group, source):
        context = min(source.config.context, loading.LONGEST)
        check_request(source.config, args.rows, context, args.stride)
        scored = documents or heldout(args.data, source.tokenizer)
        model = source.load(args.dtype)
        result = score(model, scored, args.rows, context, args.stride, args.dispatch)
        if group.number == 0:
            documents = documents or list(scored.texts(model.tokenizer))  # type: ignore[union-attr]
            sys.stdout.write(render(result, documents, args.json) + "\n")
    return 0


def render(result: dict[str, float], documents: list[str], as_json: bool) -> str:
    """The scores beside those of compressors, as text or one JSON object."""
    from k2jax.data import compressors

    for name, bits in compressors(documents).items():
        result[f"{name}_bits_per_byte"] = bits
    if as_json:
        return json.dumps(result)
    return (
        f"{result['bits_per_byte']:.4f} bits per byte"
        f" (gzip -9: {result['gzip_bits_per_byte']:.4f}, xz -9: {result['xz_bits_per_byte']:.4f})\n"
        f"{result['nats_per_token']:.4f} nats per token, perplexity {result['perplexity']:.2f}\n"
        f"{result['tokens']} tokens, {result['bytes']} bytes in {result['seconds']:.1f} s"
    )
