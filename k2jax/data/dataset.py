"""From a path to tokenised training and held-out text, kept for the next time."""

import dataclasses
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from k2jax.config import ConfigError
from k2jax.data import mixture, readers, sources, store
from k2jax.data import token_folder as tokens
from k2jax.data.mixture import Mixture
from k2jax.data.store import Store
from k2jax.data.stream import Stream
from k2jax.runtime.files import default_cache
from k2jax.text.kimi_tokenizer import FILE, PATTERN, Tokenizer
from k2jax.text.train_bpe import train_tokenizer
from k2jax.text.unicode import replace_surrogates

# A tokenizer is trained on every k-th document, so that about this much is read. Half of the
# standard library gives 0.3% more tokens on held-out text than all of it does, in half the time.
TRAIN_CHARACTERS = 6_000_000
SAMPLES, SAMPLE = 64, 16_384  # of a fingerprint: how many, and tokens in each

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Data:
    """Text ready for training.

    Attributes:
        title: the path that was opened.
        tokenizer: trained on the training text, or loaded.
        train: documents to learn from.
        heldout: documents to score.
        heldout_names: their names, in the order of `heldout`; folders of tokens have none.
        fingerprint: SHA-256 of the documents' lengths, and of samples of their tokens: wherever
            they are, and whenever they were written.
    """

    title: str
    tokenizer: Tokenizer
    train: Stream | Mixture
    heldout: Store
    heldout_names: tuple[str, ...] = ()
    fingerprint: str = ""

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of the held-out documents: what bits per byte divides by."""
        return self.heldout.bytes

    def heldout_texts(self) -> list[str]:
        """The held-out documents, exactly as they were read."""
        return list(self.heldout.texts(self.tokenizer))


def open_data(
    path: str = "",
    tokenizer: str = "",
    vocab: int = 4_096,
    *,
    cache: str | Path | None = None,
    progress: Say | None = None,
) -> Data:
    """Find, split and tokenise text; the second time, open what the first one left.

    Args:
        path: see `sources.find`; empty means Python's standard library. Or a folder that
            `k2jax data` wrote, or several with weights: `a:0.7,b:0.3`.
        tokenizer: a `tiktoken.model` file or a folder with one; empty means the one in the
            folder of tokens, or to train one on the training documents.
        vocab: ids the model has; a trained tokenizer fills them, a loaded one must fit.
        cache: folder to keep the result in; without it, `default_cache()`.
        progress: called with one line before each slow part.

    Raises:
        ConfigError: no data, a bad tokenizer, one too large for the model, an unwritable cache.
    """
    if folders := _token_folders(path):
        return _open_folders(path, folders, tokenizer, vocab)
    source = sources.find(path)
    progress = progress or _ignore
    if left_out := source.describe_left_out():
        progress(left_out)
    loaded = _load_tokenizer(tokenizer, vocab) if tokenizer else None
    key = _key(source.fingerprint(), loaded.digest() if loaded else f"bpe {vocab}")
    folder = store.cached(
        Path(cache) if cache else default_cache(),
        key,
        lambda new: _build(new, source, loaded, vocab, progress),
        _open if loaded else _open_trained,
    )
    train, heldout, names = _open(folder)
    both = _fingerprint(*(fact for part in (train, heldout) for fact in _facts(part)))
    return Data(source.title, loaded or Tokenizer.load(folder), train, heldout, names, both)


def check(path: str = "", tokenizer: str = "", vocab: int = 4_096) -> None:
    """See that there is data at `path`, as far as that is quick; arguments as of `open_data`.

    Raises:
        ConfigError: there is none, or a folder of tokens is damaged or does not fit.
    """
    if folders := _token_folders(path):
        _open_folders(path, folders, tokenizer, vocab)
    else:
        sources.find(path)


def _token_folders(path: str) -> list[tuple[str, float]]:
    """Folders of tokens and their weights; none where `path` is text."""
    mixed = mixture.parse(path)
    for folder, _ in mixed:
        if not tokens.holds_tokens(folder):
            sources.find(folder)
            raise ConfigError(
                f"{folder} is text; a mixture takes folders of tokens: k2jax data {folder} DST"
            )
    if mixed:
        return mixed
    return [(path, 1.0)] if path != sources.STDLIB and tokens.holds_tokens(path) else []


def _open_folders(path: str, folders: list[tuple[str, float]], tokenizer: str, vocab: int) -> Data:
    opened = [tokens.open_tokens(folder) for folder, _ in folders]
    first = opened[0]
    _check_vocab(folders[0][0], first.tokenizer, vocab)
    loaded = [(tokenizer, Tokenizer.load(tokenizer).digest())] if tokenizer else []
    digests = [
        (folder, o.manifest.tokenizer) for (folder, _), o in zip(folders, opened, strict=True)
    ]
    for name, digest in (*loaded, *digests):
        if digest != first.manifest.tokenizer:
            raise ConfigError(
                f"{folders[0][0]} was made with another tokenizer than {name}:"
                f" {first.manifest.tokenizer[:12]} and {digest[:12]}"
            )
    names, weights = zip(*folders, strict=True)
    train = Mixture(tuple(o.train for o in opened), weights, names)
    heldout = tokens.joined([o.heldout for o in opened])
    sides = [(o.manifest.train, o.manifest.heldout, o.manifest.tokenizer) for o in opened]
    both = _fingerprint(repr(sides).encode())
    whole = train if len(opened) > 1 else first.train
    return Data(path, first.tokenizer, whole, heldout, fingerprint=both)


def _facts(store: Store) -> Iterator[bytes]:
    """Lengths of all documents, and tokens from places all over them."""
    yield np.asarray(store.offsets).tobytes()
    for start in np.linspace(0, max(store.size - SAMPLE, 0), SAMPLES).astype(int):
        yield np.asarray(store.tokens[start : start + SAMPLE]).tobytes()


def _fingerprint(*facts: bytes) -> str:
    digest = hashlib.sha256()
    for fact in facts:
        digest.update(fact)
    return digest.hexdigest()


def compressors(texts: Iterable[str]) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9` need for the texts, one after the other."""
    content = replace_surrogates("".join(texts)).encode()
    if not content:
        raise ValueError("no text to compress")
    packed = {
        "gzip": gzip.compress(content, compresslevel=9, mtime=0),
        "xz": lzma.compress(content, preset=9),
    }
    return {name: 8 * len(short) / len(content) for name, short in packed.items()}


def _load_tokenizer(path: str, vocab: int) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    _check_vocab(path, tokenizer, vocab)
    return tokenizer


def _check_vocab(path: str, tokenizer: Tokenizer, vocab: int) -> None:
    if tokenizer.vocab > vocab:
        raise ConfigError(
            f"tokenizer {path} has {tokenizer.vocab} tokens and the model's vocab is {vocab}; "
            f"set model.vocab to {tokenizer.vocab} or more"
        )


def _ignore(line: str) -> None:
    """Report nothing."""


def _key(*facts: str) -> str:
    reading = (readers.BLOCK, readers.RULES)
    rules = (store.FORMAT, PATTERN, sources.HELD_OUT_ONE_IN, reading, TRAIN_CHARACTERS)
    return hashlib.sha256(repr((rules, facts)).encode()).hexdigest()[:32]


def _open(folder: Path) -> tuple[Store, Store, tuple[str, ...]]:
    names = tuple(json.loads((folder / "heldout_names.json").read_text()))
    return store.read(folder / "train"), store.read(folder / "heldout"), names


def _open_trained(folder: Path) -> None:
    _open(folder)
    Tokenizer.load(folder)


def _build(
    folder: Path, source: sources.Source, loaded: Tokenizer | None, vocab: int, progress: Say
) -> None:
    split = sources.split(source)
    if notes := split.tally.describe():
        progress(f"{source.title}: {'; '.join(notes)}")
    heldout = frozenset(split.heldout)

    def texts(kept: bool) -> Iterator[str]:
        return (d.text for d in source.documents() if (d.name in heldout) == kept)

    if loaded:
        tokenizer = loaded
    else:
        progress(f"training a tokenizer of {vocab} tokens")
        step = -(-split.train_characters // TRAIN_CHARACTERS)
        tokenizer = train_tokenizer(islice(texts(False), 0, None, step), vocab, folder / FILE)
    progress(f"tokenising {source.title}")
    store.write(folder / "train", texts(False), tokenizer)
    store.write(folder / "heldout", texts(True), tokenizer)
    (folder / "heldout_names.json").write_text(json.dumps(split.heldout))
