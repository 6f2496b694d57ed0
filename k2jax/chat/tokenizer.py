"""Kimi's tokenizer: byte-level BPE in the `tiktoken.model` format, and a trainer for small ones.

A file holds lines `base64(token bytes) SPACE rank`; a token's id is its rank. 256 special tokens
follow the base tokens. Nothing is normalised, so decoding gives back every byte.

Source: [TOK], [TOKIDS] (spec 5.1).
"""

import base64
import hashlib
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from k2jax.config import ConfigError

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

    def __init__(self, ranks: dict[bytes, int]):
        """Build from base tokens.

        Args:
            ranks: token bytes to rank; ranks are 0..n-1 and all 256 single bytes are there.
        """
        self.base = len(ranks)
        self.vocab = self.base + SPECIALS
        self.specials = {
            NAMED_SPECIALS.get(id_ - self.base, f"<|reserved_token_{id_}|>"): id_
            for id_ in range(self.base, self.vocab)
        }
        self.bos, self.eos = self.specials["[BOS]"], self.specials["[EOS]"]
        self.im_end, self.pad = self.specials["<|im_end|>"], self.specials["[PAD]"]
        self._ranks = ranks
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

        Raises:
            ConfigError: the file is missing, empty or malformed; one line says where.
        """
        file = Path(path)
        if file.is_dir():
            if not (file / FILE).is_file():
                raise ConfigError(f"folder {path} has no {FILE}")
            file = file / FILE
        if not file.is_file():
            raise ConfigError(f"no tokenizer at {path}: give a {FILE} file or a folder with one")
        return cls(_parse(file.read_bytes(), str(file)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the `tiktoken.model` file, all or nothing."""
        _write_whole(Path(path), self.model_bytes())

    def model_bytes(self) -> bytes:
        """The `tiktoken.model` file: a line per base token, in rank order."""
        lines = (
            base64.b64encode(token) + b" %d\n" % rank
            for token, rank in sorted(self._ranks.items(), key=lambda item: item[1])
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
        for piece in pieces(text):
            if special:
                ids += self._encoding.encode(piece, allowed_special="all")
            else:
                ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores; special tokens are never read."""
        parts, owner = [], []
        for index, text in enumerate(texts):
            for piece in pieces(text):
                parts.append(piece)
                owner.append(index)
        threads = os.cpu_count() or 1
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
        ids = [int(i) for i in ids]
        if wrong := [i for i in ids if not 0 <= i < self.vocab]:
            raise ValueError(f"token id {wrong[0]} is outside 0..{self.vocab - 1}")
        return self._encoding.decode_bytes(ids)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text each id stands for, int32 [vocab]; 0 for special tokens."""
        lengths = np.zeros(self.vocab, np.int32)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths


def pieces(text: str) -> Iterator[str]:
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


def train_tokenizer(texts: Iterable[str], vocab: int, path: str | os.PathLike[str]) -> Tokenizer:
    """Train byte-level BPE on `texts`, with Kimi's pre-split, and write it to `path`.

    Ours: how the published merges were found is not said. The result has fewer tokens than
    `vocab` where the text has no more pairs that occur twice.

    Args:
        texts: documents.
        vocab: tokens in all, 256 bytes and 256 special tokens included.
        path: the `tiktoken.model` file to write.

    Raises:
        ConfigError: `vocab` has no room for the bytes and special tokens.
    """
    if vocab < 256 + SPECIALS:
        raise ConfigError(
            f"vocab is {vocab}; a tokenizer needs at least 512: 256 bytes and 256 special tokens"
        )
    tokenizer = Tokenizer(_train(texts, vocab - SPECIALS))
    tokenizer.save(path)
    return tokenizer


def trainable(base: int) -> tuple[Any, Any]:
    """An untrained tokenizer of the `tokenizers` package with Kimi's pre-split, and its trainer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=base,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    return bpe, trainer


def _train(texts: Iterable[str], base: int) -> dict[bytes, int]:
    bpe, trainer = trainable(base)
    bpe.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    byte = _printable_bytes()
    # An id there is the order in which a token was made, which is what a rank means here.
    return {bytes(byte[c] for c in token): rank for token, rank in bpe.get_vocab().items()}


def _printable_bytes() -> dict[str, int]:
    """The character that stands for a byte in byte-level BPE files, to that byte.

    Printable Latin-1 stands for itself, the other bytes for U+0100 onwards in order.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in kept]
    return {chr(b): b for b in kept} | {chr(0x100 + i): b for i, b in enumerate(other)}


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
