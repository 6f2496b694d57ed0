"""`k2jax report`: one HTML page with the plots of a run. Loads no jax, so it answers at once."""

import argparse
import sys
from pathlib import Path

from k2jax.config import ConfigError
from k2jax.files import replace
from k2jax.report.page import page
from k2jax.report.read import read

NAME = "report.html"


def report(run: str | Path, out: str | Path = "") -> Path:
    """Write the page of a run's folder; where it is.

    Args:
        run: a folder with `metrics.jsonl`; the run may be going on, or of an older version.
        out: the file; `report.html` in the run's folder, if not given.

    Raises:
        ConfigError: no such folder, nothing recorded in it, or the page cannot be written.
    """
    found = read(Path(run))
    target = Path(out or Path(run) / NAME)
    try:
        replace(target, page(found))  # a page that is open in a browser is never half there
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
    return target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax report`."""
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", default="", metavar="FILE", help=f"the page; default: RUN/{NAME}")


def main(args: argparse.Namespace) -> int:
    """Write the page and say where; the exit code."""
    target = report(args.run, args.out)
    sys.stdout.write(f"{target}: {target.stat().st_size / 1e3:.0f} kB\n")
    return 0
