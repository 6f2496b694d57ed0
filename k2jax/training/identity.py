"""What gives a run's weights their meaning, compared between its starts.

A token's id must mean what it meant when the weights were learned, and the order of rows depends
on all of the data. The run's folder keeps the tokenizer and, in `data.json`, what the data was.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from k2jax.config import ConfigError, RunConfig
from k2jax.data import Data
from k2jax.runtime.files import write_atomic
from k2jax.text import hf_tokenizer
from k2jax.text.jinja_template import TEMPLATE
from k2jax.text.kimi_tokenizer import FILE, Tokenizer
from k2jax.weights.source import open_source

NAME = "data.json"
# Beside `tiktoken.model`: names of special tokens, the chat template, what ends a reply.
BESIDE = (hf_tokenizer.CONFIG, TEMPLATE, "generation_config.json", "special_tokens_map.json")


@dataclasses.dataclass(frozen=True)
class Identity:
    """What `data.json` holds.

    Attributes:
        tokenizer: SHA-256 of its model file.
        data: SHA-256 that changes with the documents.
        trained: whether the tokenizer was trained on that data.
    """

    tokenizer: str
    data: str
    trained: bool

    @classmethod
    def read(cls, out: Path) -> "Identity | None":
        """Read that of a run; None: it was begun by a version that kept none.

        Raises:
            ConfigError: the file is damaged.
        """
        file = out / NAME
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            raise ConfigError(f"{file} is damaged; it says what data the run has seen") from None

    def write(self, out: Path) -> None:
        """Write it into a run's folder."""
        write_atomic(out / NAME, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def choose_tokenizer(
    run: RunConfig, out: Path, init: str, resumed: bool, say: Callable[[str], None]
) -> str:
    """Return where to read the tokenizer from; "": that of the data, or one trained on it.

    A named one wins; then, on a resume, the run's own; with `init` the one beside those weights.

    Raises:
        ConfigError: the weights have a tokenizer that training cannot use.
    """
    if run.data.tokenizer:
        return run.data.tokenizer
    if resumed:
        known = Identity.read(out)
        # One that was trained here is in the data's cache already, with the text it made.
        return str(out) if known and not known.trained and (out / FILE).is_file() else ""
    if not init:
        return ""
    folder = open_source(init).folder
    if (folder / FILE).is_file():
        return str(folder)
    if (folder / hf_tokenizer.FILE).is_file():
        raise ConfigError(
            f"--init {init} has a tokenizer.json, which training does not read; set"
            f" --data.tokenizer to the {FILE} of these weights"
        )
    say(f"warning: no tokenizer beside --init {init}: their ids may mean something else here")
    return ""


def require_same_data(data: Data, out: Path) -> None:
    """Refuse to resume a run with another tokenizer, or on other data.

    Raises:
        ConfigError: says what differs and what to do.
    """
    known, digest = Identity.read(out), data.tokenizer.digest()
    own = out / FILE
    before = known.tokenizer if known else Tokenizer.load(own).digest() if own.is_file() else digest
    what = ""
    if known and known.data != data.fingerprint:
        what = f"on other data: {data.title} has changed since it began"
    if before != digest and not (known and known.trained):
        what = f"with another tokenizer: {before[:12]}, not {digest[:12]}"
    if what:
        raise ConfigError(
            f"{out} holds a run {what}; to train its weights on: --init {out} --data.tokenizer"
            f" {own}, and another --out"
        )


def record(data: Data, out: Path, init: str, trained: bool) -> None:
    """Write what the data of a new run is, and the tokenizer with what was beside it.

    Args:
        data: of the run.
        out: the run's folder.
        init: weights that it starts from; "": drawn ones.
        trained: whether the tokenizer was trained on the data.
    """
    identity = Identity(data.tokenizer.digest(), data.fingerprint, trained)
    data.tokenizer.save(out / FILE)
    identity.write(out)
    folder = open_source(init).folder if init else None
    if not folder or folder == out or not (folder / FILE).is_file():
        return
    if Tokenizer.load(folder).digest() == identity.tokenizer:
        for name in BESIDE:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)


def complete(data: Data, out: Path) -> None:
    """Write what a run of an older version did not keep; what it did keep is not touched."""
    if not (out / FILE).is_file():
        data.tokenizer.save(out / FILE)
    if not (out / NAME).is_file():
        Identity(data.tokenizer.digest(), data.fingerprint, trained=False).write(out)
