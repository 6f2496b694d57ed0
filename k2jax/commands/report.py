"""`k2jax report`: one HTML page with the plots of a run."""

import argparse
import sys

from k2jax.report import NAME, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax report`."""
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", default="", metavar="FILE", help=f"the page; default: RUN/{NAME}")


def main(args: argparse.Namespace) -> int:
    """Write the page and say where; the exit code."""
    target = report(args.run, args.out)
    sys.stdout.write(f"{target}: {target.stat().st_size / 1e3:.0f} kB\n")
    return 0
