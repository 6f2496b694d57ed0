"""`k2jax evaluate`: how well a model predicts text it has not seen, or does tasks.

JAX is imported when there is something to compute, so that help and mistakes answer at once.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from k2jax.commands import evaluate_tasks, loading
from k2jax.config import ConfigError

if TYPE_CHECKING:
    from k2jax.data import Store
    from k2jax.model import Model
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
    loading.add_arguments(parser, optional=True)
    parser.add_argument(
        "--data",
        default="",
        metavar="FILE",
        help="text to score, all of it, or a folder of"
        " tokens: what it holds out; default: the modules of Python's standard library that"
        " training leaves out",
    )
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="N",
        help="tokens between overlapping windows; default: no overlap",
    )
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows at once; default: 8")
    parser.add_argument(
        "--dispatch",
        choices=("allgather", "alltoall"),
        default="",
        help="how tokens reach their experts on a mesh; default: what takes less memory there",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    evaluate_tasks.add_arguments(parser)


def evaluate(
    model: "Model | str",
    data: str | Iterable[str] = "",
    *,
    rows: int = 8,
    context: int = 0,
    stride: int = 0,
) -> dict[str, float]:
    """Score text in this process: `k2jax evaluate` for Python.

    Keys: `nats_per_token`, `perplexity` (per token), `bits_per_byte`, `tokens`, `bytes`, `seconds`;
    `gzip_bits_per_byte` and `xz_bits_per_byte` of the same text.

    Args:
        model: a model, or the path of one.
        data: texts; or a path, as of `--data`: text to score, all of it, or a folder of tokens,
            what it holds out. Empty: the modules of Python's standard library that training
            leaves out.
        rows: rows computed at once.
        context: tokens per row; 0: the model's context, at most 4,096.
        stride: tokens between overlapping windows; 0: no overlap.

    Raises:
        ConfigError: no text, no model or tokenizer, or a size out of range.
    """
    from k2jax.data.token_folder import holds_tokens

    folder = data if isinstance(data, str) and holds_tokens(data) else ""
    # Before the model: a mistake in the path should not wait for weights.
    documents = [] if folder else texts(data) if isinstance(data, str) else list(data)
    from k2jax.evals.perplexity import score
    from k2jax.runtime import backend
    from k2jax.sharding import use_mesh_of
    from k2jax.weights.source import load

    if isinstance(model, str):
        backend.prepare()
        model = load(model)
    context = context or min(model.config.context, loading.LONGEST)
    store = heldout(folder, model.tokenizer) if folder else None
    with use_mesh_of(*model.params.values()):
        result = score(model, store or documents, rows, context, stride)
    if store and model.tokenizer:
        documents = list(store.texts(model.tokenizer))
    return result | compressed(documents)


def compressed(documents: list[str]) -> dict[str, float]:
    """Return what compressors need for the same text, by the names of the scores."""
    from k2jax.data import compressors

    return {f"{name}_bits_per_byte": bits for name, bits in compressors(documents).items()}


def main(args: argparse.Namespace) -> int:
    """Print the scores, and what gzip and xz need for the same text; the exit code."""
    if args.compare:
        return evaluate_tasks.compare(args)
    if args.checkpoint is None:
        raise ConfigError("evaluate needs a checkpoint: k2jax evaluate CHECKPOINT")
    if args.tasks or args.preset:
        return evaluate_tasks.evaluate(args)
    evaluate_tasks.refuse_without_tasks(args)
    from k2jax.data.token_folder import holds_tokens

    mesh = loading.read_mesh(args)
    documents = [] if holds_tokens(args.data) else texts(args.data)
    from k2jax.evals.perplexity import check_request, score

    with loading.opened(args, mesh) as (group, source):
        context = min(source.config.context, loading.LONGEST)
        check_request(source.config, args.rows, context, args.stride)
        scored = documents or heldout(args.data, source.tokenizer)
        model = source.load(args.dtype, args.weights)
        result = score(model, scored, args.rows, context, args.stride, args.dispatch)
        if group.number == 0:
            documents = documents or list(scored.texts(model.tokenizer))  # type: ignore[union-attr]
            sys.stdout.write(render(result, documents, args.json) + "\n")
    return 0


def render(result: dict[str, float], documents: list[str], as_json: bool) -> str:
    """The scores beside those of compressors, as text or one JSON object."""
    result = result | compressed(documents)
    if as_json:
        return json.dumps(result)
    return (
        f"{result['bits_per_byte']:.4f} bits per byte"
        f" (gzip -9: {result['gzip_bits_per_byte']:.4f}, xz -9: {result['xz_bits_per_byte']:.4f})\n"
        f"{result['nats_per_token']:.4f} nats per token, perplexity {result['perplexity']:.2f}\n"
        f"{result['tokens']} tokens, {result['bytes']} bytes in {result['seconds']:.1f} s"
    )
