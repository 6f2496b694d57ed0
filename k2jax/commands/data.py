"""`k2jax data`: tokenise once, in parallel, what training then reads as fast as it can."""

import argparse
import sys

from k2jax.config import ConfigError
from k2jax.runtime.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax data`."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="text, .jsonl, .json or .csv (also .gz .zst .xz .bz2),"
        " .parquet, .arrow, .arrayrecord, or a folder; records have a text, or messages of a"
        " conversation",
    )
    parser.add_argument("folder", metavar="DST", help="folder of tokens: --data.path of train")
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="FILE",
        help="a tiktoken.model file, or a folder with"
        " one; conversations are written by the folder's chat template, or by K2's",
    )
    parser.add_argument(
        "--train-tokenizer",
        type=int,
        default=0,
        metavar="VOCAB",
        help="instead: train one of so many tokens on the source",
    )
    parser.add_argument(
        "--field", default="text", help="of records, that has the text; default: text"
    )
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes; default: one a core"
    )


def main(args: argparse.Namespace) -> int:
    """Tokenise; the exit code."""
    if args.workers < 0:
        raise ConfigError(f"--workers is {args.workers}; it must be at least 1")
    from k2jax.data.sources import find
    from k2jax.data.tally import Tally
    from k2jax.data.tokenise import tokenise

    if left_out := find(args.source, args.field).describe_left_out():
        sys.stdout.write(f"{left_out}\n")
    report = _Report()
    with report.progress:
        manifest = tokenise(
            args.source,
            args.folder,
            tokenizer=args.tokenizer,
            vocab=args.train_tokenizer,
            field=args.field,
            workers=args.workers,
            watch=report.show,
        )
    train, heldout = manifest.train, manifest.heldout
    sys.stdout.write(
        f"{args.folder}: {train.documents + heldout.documents:,} documents,"
        f" {train.tokens + heldout.tokens:,} tokens in {len(train.shards)} shard(s),"
        f" {heldout.documents:,} documents of them held out; {report.rate()}\n"
    )
    if notes := Tally(**manifest.tally).describe():
        sys.stdout.write(f"{args.source}: {'; '.join(notes)}\n")
    return 0


class _Report:
    """Shows how much text is tokenised, how fast, and how long it will still take."""

    def __init__(self) -> None:
        self.documents = self.bytes = 0
        self.progress = Progress(1.0, _say, self._describe)

    def show(self, documents: int, size: int, share: float) -> None:
        """Report how far it is."""
        if not self.documents:
            self.progress.restart()  # the start, or training a tokenizer, is no part of the rate
        self.documents, self.bytes = documents, size
        self.progress.update(share)

    def _describe(self, job: Progress) -> str:
        minutes, seconds = divmod(round(job.seconds_left), 60)
        return f"{self.documents:,} documents, {self.rate()}, about {minutes}:{seconds:02d} left"

    def rate(self) -> str:
        """Describe the text that this call tokenised, and how fast."""
        if not self.bytes:
            return "nothing left to do"
        speed = self.bytes / 1e6 / self.progress.elapsed
        return f"{self.bytes / 1e6:,.1f} MB of text, {speed:.1f} MB/s"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
