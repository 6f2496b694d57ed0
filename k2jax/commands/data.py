"""`k2jax data`: tokenise once, in parallel, what training then reads as fast as it can."""

import argparse
import sys
import time
from typing import Any

from k2jax.config import ConfigError

LINES = 10.0  # seconds between lines where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax data`."""
    parser.add_argument(
        "source", metavar="SRC", help="text or .jsonl (also .gz, .zst), .parquet, .arrow,"
        " .arrayrecord, or a folder; records have a text, or messages of a conversation",
    )  # fmt: skip
    parser.add_argument("folder", metavar="DST", help="folder of tokens: --data.path of train")
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE", help="a tiktoken.model file, or a folder with"
        " one; conversations are written by the folder's chat template, or by K2's",
    )  # fmt: skip
    parser.add_argument(
        "--train-tokenizer", type=int, default=0, metavar="VOCAB", help="instead: train one of so"
        " many tokens on the source",
    )  # fmt: skip
    parser.add_argument(
        "--field", default="text", help="of JSON lines, Parquet and Arrow; default: text"
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes; default: one a core"
    )


def main(args: argparse.Namespace) -> int:
    """Tokenise; the exit code."""
    if args.workers < 0:
        raise ConfigError(f"--workers is {args.workers}; it must be at least 1")
    from k2jax.data.tokenise import tokenise

    with Progress() as progress:
        manifest = tokenise(
            args.source, args.folder, tokenizer=args.tokenizer, vocab=args.train_tokenizer,
            field=args.field, workers=args.workers, watch=progress.show,
        )  # fmt: skip
    train, heldout = manifest.train, manifest.heldout
    sys.stdout.write(
        f"{args.folder}: {train.documents + heldout.documents:,} documents,"
        f" {train.tokens + heldout.tokens:,} tokens in {len(train.shards)} shard(s),"
        f" {heldout.documents:,} documents of them held out; {progress.rate()}\n"
    )
    return 0


class Progress:
    """A bar where there is a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.began = self.shown = 0.0
        self.documents = self.bytes = 0
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        """Show the bar."""
        if sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(BarColumn(None), TextColumn("{task.description}"), expand=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=1.0)
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()

    def show(self, documents: int, size: int, share: float) -> None:
        """Tell how far it is."""
        now = time.perf_counter()
        if not self.documents:
            self.began = self.shown = now  # without starting, or training a tokenizer
        self.documents, self.bytes = documents, size
        if now - self.shown < (LINES if self.bar is None else 0.1):
            return
        self.shown = now
        left = (now - self.began) * (1 - share) / share if share else 0.0
        minutes, seconds = divmod(round(left), 60)
        text = f"{documents:,} documents, {self.rate()}, about {minutes}:{seconds:02d} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=share, description=text)
        else:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def rate(self) -> str:
        """Text done by this call, and how fast."""
        if not self.bytes:
            return "nothing left to do"
        seconds = max(time.perf_counter() - self.began, 1e-9)
        return f"{self.bytes / 1e6:,.1f} MB of text, {self.bytes / 1e6 / seconds:.1f} MB/s"
