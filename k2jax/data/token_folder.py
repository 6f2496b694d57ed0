"""Folders of tokens: what `k2jax data` writes and training reads.

tokens.json                 comes last: sources, tokenizer, counts, files
tiktoken.model              the tokenizer, with its tokenizer_config.json and chat template
train-00000.arrayrecord     documents to learn from (`k2jax.data.shards`)
heldout-00000.arrayrecord   documents to score
.parts/                     while the work goes on
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from k2jax.config import ConfigError
from k2jax.data.shards import Shard, Shards
from k2jax.data.sources import TOKENS, WORK
from k2jax.data.store import Store
from k2jax.text.kimi_tokenizer import Tokenizer

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Split:
    """The documents of one side.

    Attributes:
        documents: how many.
        conversations: how many of them; where there are any, no document is cut that fits a row.
        tokens: of the documents.
        scored: tokens that are learned, or scored.
        bytes: UTF-8 bytes of those.
        shards: files, in the order of the stream.
    """

    documents: int = 0
    conversations: int = 0
    tokens: int = 0
    scored: int = 0
    bytes: int = 0
    shards: tuple[Shard, ...] = ()

    def __add__(self, other: "Split") -> "Split":
        """Both, one after the other."""
        names = [field.name for field in dataclasses.fields(self)]
        return Split(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Split":
        """What `dataclasses.asdict` made."""
        return cls(**{**fields, "shards": tuple(Shard(*shard) for shard in fields["shards"])})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        plan: `source` as it was named, `files` (name, bytes, time of the last change in ns),
            `field`, `tokenizer` (sha256 of its model file, or what it was trained for) and
            `template` (sha256 of the chat template's files, or "").
        tokenizer: sha256 of `tiktoken.model`.
        vocab: its tokens.
        train: documents to learn from.
        heldout: documents to score.
        tally: what reading the source replaced and passed over, as `Tally` has it.
    """

    plan: dict[str, Any]
    tokenizer: str
    vocab: int
    train: Split
    heldout: Split
    tally: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The content of `tokens.json`."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """A folder's `tokens.json`.

        Raises:
            ConfigError: it is of another version, or damaged.
        """
        try:
            fields = json.loads((folder / TOKENS).read_text())
            if (version := fields.pop("format")) != FORMAT:
                raise ConfigError(f"{folder} has format {version}, this version reads {FORMAT}")
            fields |= {side: Split.from_json(fields[side]) for side in ("train", "heldout")}
            return cls(**fields)
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{folder / TOKENS} is damaged: {error!r}") from None


class Opened(NamedTuple):
    """A folder of tokens, ready to read."""

    manifest: Manifest
    tokenizer: Tokenizer
    train: Shards
    heldout: Store


def holds_tokens(path: str) -> bool:
    """Whether `path` is a folder of tokens.

    Raises:
        ConfigError: it is going to be one.
    """
    folder = Path(path)
    if not path or (folder / TOKENS).is_file():
        return bool(path)
    if (folder / WORK).is_dir():
        raise ConfigError(f"{path} is unfinished; the `k2jax data` command that began it goes on")
    return False


def open_tokens(path: str) -> Opened:
    """Open a finished folder.

    Raises:
        ConfigError: a file is missing or is not what the manifest says.
    """
    folder = Path(path)
    manifest, tokenizer = Manifest.read(folder), Tokenizer.load(folder)
    if tokenizer.digest() != manifest.tokenizer:
        raise ConfigError(f"{folder}: tiktoken.model is not the one that its tokens were made with")
    whole = bool(manifest.train.conversations)
    heldout = Shards(folder, manifest.heldout.shards).store(tokenizer.byte_lengths())
    return Opened(manifest, tokenizer, Shards(folder, manifest.train.shards, whole), heldout)


def joined(stores: list[Store]) -> Store:
    """Documents of several stores, one after the other."""
    starts = np.cumsum([0] + [store.size for store in stores])
    offsets = [store.offsets[:-1] + start for store, start in zip(stores, starts, strict=False)]
    masks = [
        np.zeros(store.size, bool) if store.unscored is None else store.unscored for store in stores
    ]
    return Store(
        np.concatenate([store.tokens for store in stores]),
        np.concatenate([*offsets, starts[-1:]]),
        sum(store.bytes for store in stores),
        np.concatenate(masks),
    )
