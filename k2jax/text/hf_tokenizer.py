"""Byte-level `tokenizer.json` files, as DeepSeek-V3 has one, through the `tokenizers` package."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from k2jax.config import ConfigError
from k2jax.runtime.foreign import FOREIGN_BYTES, describe_foreign
from k2jax.text.interface import Template, check_ids
from k2jax.text.unicode import replace_surrogates

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"


class HfTokenizer:
    """Text to token ids and back, as a `tokenizer.json` describes it.

    Every added token counts as a control token: ordinary text never becomes one.
    """

    def __init__(self, content: dict[str, Any], bos: str, eos: str, stops: Sequence[int] = ()):
        """Build from the parsed file.

        Args:
            content: of `tokenizer.json`.
            bos: name of the token that begins a document.
            eos: name of the token that ends one.
            stops: further ids that end a reply.

        Raises:
            ConfigError: it is no byte-level BPE, or has no such tokens.
        """
        from tokenizers import Tokenizer

        if "ByteLevel" not in _kinds(content.get("decoder")):
            raise ConfigError("it is no byte-level tokenizer; k2jax reads only those")
        added = content.get("added_tokens") or []
        self.specials = {token["content"]: token["id"] for token in added}
        for name, token in (("bos_token", bos), ("eos_token", eos)):
            if token not in self.specials:
                raise ConfigError(f"it has no token {token!r}, which is the {name}")
        try:
            self._whole = Tokenizer.from_str(json.dumps(content))
            # The package reads added tokens in any text, so ordinary text gets one without them.
            self._plain = Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))
        except Exception as error:  # the package raises nothing narrower
            raise ConfigError(f"the tokenizers package cannot read it: {error}") from None
        self._bytes = _token_bytes(self._plain.get_vocab(with_added_tokens=False), self.specials)
        self.vocab = max(self._bytes) + 1
        self.bos, self.eos = self.specials[bos], self.specials[eos]
        self.stops = tuple(dict.fromkeys([self.eos, *stops]))
        self.template: Template | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "HfTokenizer":
        """Read a folder's `tokenizer.json`, with the names that its `tokenizer_config.json` gives.

        Raises:
            ConfigError: a file is missing or malformed; one line says which.
        """
        folder = Path(folder)
        content, config = read_json(folder / FILE), read_json(folder / CONFIG)
        names = [_name(config.get(key)) for key in ("bos_token", "eos_token")]
        if None in names:
            missing = ("bos_token", "eos_token")[names.index(None)]
            raise ConfigError(f"{folder / CONFIG} names no {missing}")
        try:
            return cls(content, str(names[0]), str(names[1]), read_published_stops(folder))
        except ConfigError as error:
            raise ConfigError(f"{folder / FILE}: {error}") from None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`; nothing is added or stripped.

        Args:
            text: any string.
            special: read the names of added tokens as those tokens. Leave it off for text from
                outside, which could otherwise write control tokens.
        """
        tokenizer = self._whole if special else self._plain
        return tokenizer.encode(replace_surrogates(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores; control tokens are never read."""
        valid = [replace_surrogates(text) for text in texts]
        encodings = self._plain.encode_batch(valid, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, control tokens their names."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of token ids.

        Raises:
            ValueError: an id outside 0..vocab-1.
        """
        return b"".join(self._bytes.get(i, b"") for i in check_ids(ids, self.vocab))

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text each id stands for, int32 [vocab]; 0 for control tokens and unused ids."""
        lengths = np.zeros(self.vocab, np.int32)
        control = set(self.specials.values())
        for id_, token in self._bytes.items():
            lengths[id_] = 0 if id_ in control else len(token)
        return lengths


def read_published_stops(folder: Path) -> list[int]:
    """Ids that a published folder's configs call `eos_token_id`."""
    stops: list[int] = []
    for file in (folder / "generation_config.json", folder / "config.json"):
        ids = read_json(file).get("eos_token_id") if file.is_file() else None
        stops += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return stops


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigError: it is missing, or holds something else.
    """
    text = read_text(file)
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if foreign := describe_foreign(text[:FOREIGN_BYTES].encode()):
            raise ConfigError(f"{file} is {foreign}") from None
        raise ConfigError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} does not hold a JSON object")
    return content


def read_text(file: Path) -> str:
    """A file's text.

    Raises:
        ConfigError: it is missing, or no UTF-8.
    """
    try:
        return file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no file {file}") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file} is not readable: {error}") from None


def printable_bytes() -> dict[str, int]:
    """The character that stands for a byte in byte-level BPE files, to that byte.

    Printable Latin-1 stands for itself, the other bytes for U+0100 onwards in order.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in kept]
    return {chr(b): b for b in kept} | {chr(0x100 + i): b for i, b in enumerate(other)}


def _token_bytes(vocab: dict[str, int], specials: dict[str, int]) -> dict[int, bytes]:
    byte = printable_bytes()
    control = {id_: name.encode() for name, id_ in specials.items()}
    ordinary = {
        id_: bytes(byte[c] for c in token) for token, id_ in vocab.items() if id_ not in control
    }
    return ordinary | control


def _kinds(step: Any) -> set[str]:
    """The types of a decoder and of all it is made of."""
    if not isinstance(step, dict):
        return set()
    inner = [kind for part in step.get("decoders", []) for kind in _kinds(part)]
    return {step.get("type", ""), *inner}


def _name(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
