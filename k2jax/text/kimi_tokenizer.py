"""Kimi's tokenizer: byte-level BPE in the `tiktoken.model` format.

A file holds lines `base64(token bytes) SPACE rank`; a token's id is its rank. 256 special tokens
follow the base tokens. Nothing is normalised, so decoding gives back every byte.

Source: [TOK], [TOKIDS] (spec 5.1).
"""

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from k2jax.config import ConfigError
from k2jax.runtime.files import write_atomic
from k2jax.runtime.foreign import FOREIGN_BYTES, describe_foreign
from k2jax.runtime.hardware import count_cores
from k2jax.text.hf_tokenizer import CONFIG, read_json
from k2jax.text.interface import Template, check_ids
from k2jax.text.kimi_template import KIMI_K2

FILE = "tiktoken.model"
SPECIALS = 256

# By offset from the first special id. <think> and </think> are text in K2-Thinking: not listed.
NAMED_SPECIALS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    21: "<|media_pad|>",
    254: "[UNK]",
    255: "[PAD]",
}

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# The order matters: the first alternative that matches wins. `&&` intersects classes.
ALTERNATIVES = (
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
PATTERN = "|".join(ALTERNATIVES)

MAX_PIECE = 400_000  # characters encoded at once
MAX_RUN = 25_000  # characters of one kind (white or not) in a row
_RUN = re.compile(r"\s+|\S+")


class Tokenizer:
    """Text to token ids and back, as Kimi K2 does it."""

    def __init__(self, ranks: dict[bytes, int], names: Mapping[int, str] | None = None):
        """Build from base tokens.

        Args:
            ranks: token bytes to rank; ranks are 0..n-1 and all 256 single bytes are there.
            names: of special ids, where they differ from K2's.
        """
        self.base = len(ranks)
        self.vocab = self.base + SPECIALS
        self.specials = _name_specials(self.base, names or {})
        self.bos, self.eos, self.im_end = range(self.base, self.base + 3)
        self.pad = self.vocab - 1
        # The configs say [EOS], chats end with <|im_end|> (trap 23).
        self.stops: tuple[int, ...] = (self.eos, self.im_end)
        self.template: Template | None = KIMI_K2
        self.ranks = ranks
        self._encoding = tiktoken.Encoding(
            "k2jax",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.specials,
            explicit_n_vocab=self.vocab,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a `tiktoken.model` file, or the one in a folder.

        Special tokens are called what the folder's `tokenizer_config.json` calls them.

        Raises:
            ConfigError: a file is missing, empty or malformed; one line says where.
        """
        file, names = Path(path), {}
        if file.is_dir():
            if not (file / FILE).is_file():
                raise ConfigError(f"folder {path} has no {FILE}")
            names = _read_names(file / CONFIG)
            file = file / FILE
        if not file.is_file():
            raise ConfigError(f"no tokenizer at {path}: give a {FILE} file or a folder with one")
        return cls(_parse(file.read_bytes(), str(file)), names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the `tiktoken.model` file, all or nothing."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, self.model_bytes())

    def model_bytes(self) -> bytes:
        """The `tiktoken.model` file: a line per base token, in rank order."""
        lines = (
            base64.b64encode(token) + b" %d\n" % rank
            for token, rank in sorted(self.ranks.items(), key=lambda item: item[1])
        )
        return b"".join(lines)

    def digest(self) -> str:
        """Sha-256 of the model file, hexadecimal: two tokenizers agree if and only if it does."""
        return hashlib.sha256(self.model_bytes()).hexdigest()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any string; nothing is added or stripped.
            special: read the names of special tokens as those tokens. Leave it off for text from
                outside, which could otherwise write control tokens (the published code reads them
                by default; spec trap 28).
        """
        ids: list[int] = []
        for piece in cut_pieces(text):
            if special:
                ids += self._encoding.encode(piece, allowed_special="all")
            else:
                ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` of ordinary text, uint32 [tokens]: less work for long texts."""
        try:
            encoded = [
                self._encoding.encode_to_numpy(piece, disallowed_special=())
                for piece in cut_pieces(text)
            ]
        except UnicodeEncodeError:  # half a surrogate pair, which `encode` replaces
            return np.array(self.encode(text), np.uint32)
        return np.concatenate([*encoded, np.zeros(0, np.uint32)])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores; special tokens are never read."""
        parts, owner = [], []
        for index, text in enumerate(texts):
            for piece in cut_pieces(text):
                parts.append(piece)
                owner.append(index)
        threads = count_cores()
        batch: list[list[int]] = [[] for _ in texts]
        encoded = self._encoding.encode_ordinary_batch(parts, num_threads=threads)
        for index, ids in zip(owner, encoded, strict=True):
            batch[index] = batch[index] + ids if batch[index] else ids
        return batch

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, special tokens their names."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of token ids.

        Raises:
            ValueError: an id outside 0..vocab-1.
        """
        return self._encoding.decode_bytes(check_ids(ids, self.vocab))

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text each id stands for, int32 [vocab]; 0 for special tokens."""
        lengths = np.zeros(self.vocab, np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths


def cut_pieces(text: str) -> Iterator[str]:
    """Cut `text` where Kimi's encoder cuts it; pieces are encoded on their own.

    No piece is longer than MAX_PIECE characters, or has more than MAX_RUN characters of white
    space, or of anything else, in a row. Source: [TOK].
    """
    for start in range(0, len(text), MAX_PIECE):
        piece = text[start : start + MAX_PIECE]
        if _has_long_run(piece):
            yield from _cut_runs(piece)
        else:
            yield piece


def _has_long_run(text: str) -> bool:
    # A run of more than MAX_RUN covers one of these positions: look around them and nowhere else.
    for middle in range(MAX_RUN, len(text), MAX_RUN):
        ahead = _RUN.match(text, middle)
        behind = _RUN.match(text[middle - MAX_RUN : middle][::-1])
        assert ahead and behind, "every character is white space or not"
        length = ahead.end() - middle
        if text[middle].isspace() == text[middle - 1].isspace():
            length += behind.end()
        if length > MAX_RUN:
            return True
    return False


def _cut_runs(text: str) -> Iterator[str]:
    start = 0
    for run in _RUN.finditer(text):
        for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _name_specials(base: int, names: Mapping[int, str]) -> dict[str, int]:
    """Every special token by name; one that nobody named is called after its id."""
    named = {base + at: name for at, name in NAMED_SPECIALS.items() if name not in names.values()}
    named |= {id_: name for id_, name in names.items() if base <= id_ < base + SPECIALS}
    return {named.get(i, f"<|reserved_token_{i}|>"): i for i in range(base, base + SPECIALS)}


def _read_names(config: Path) -> dict[int, str]:
    added = read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
    try:
        names = {int(id_): str(token["content"]) for id_, token in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{config}: added_tokens_decoder must map ids to tokens") from None
    if len(set(names.values())) < len(names):
        raise ConfigError(f"{config}: added_tokens_decoder gives two ids one name")
    return names


def _parse(content: bytes, name: str) -> dict[bytes, int]:
    if not content.strip():
        raise ConfigError(f"tokenizer {name} is empty")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            if foreign := describe_foreign(content[:FOREIGN_BYTES]):
                raise ConfigError(f"tokenizer {name} is {foreign}") from None
            raise ConfigError(
                f"tokenizer {name}, line {number}: expected 'base64 rank', found {line[:40]!r}"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ConfigError(f"tokenizer {name}: ranks must be 0..{len(ranks) - 1}, each once")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ConfigError(
            f"tokenizer {name} lacks {len(missing)} of the 256 bytes, first 0x{missing[0]:02x}"
        )
    return ranks
