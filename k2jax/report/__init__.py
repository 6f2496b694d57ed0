"""One HTML page with the plots of a run. Loads no jax, so it answers at once."""

from pathlib import Path

from k2jax.config import ConfigError
from k2jax.report.page import page
from k2jax.report.read import read
from k2jax.runtime.files import write_atomic

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
        write_atomic(target, page(found))  # a page that is open in a browser is never half there
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from None
    return target
