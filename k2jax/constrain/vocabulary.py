"""A tokenizer as constraints see it: bytes and sets of tokens, and what llguidance needs of it."""

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from k2jax.config import ConfigError
from k2jax.text.interface import TokenizerLike

LONG = 24  # bytes; longer tokens are only looked for where one character is repeated
CACHED = 2048  # texts whose tokens are kept
STRUCTURAL = b"{["
EOS_BYTE = 256  # the end of the text in the vocabulary of bytes
# What a string may be filled with; those with the longest tokens come first.
FILLERS = b" =-*_#.~/0aA"


def import_llguidance() -> Any:
    """The `llguidance` package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "constraining to a schema needs the package llguidance: pip install 'k2jax[serve]'"
        ) from None
    return llguidance


class _Wrapped:
    """What llguidance's TokenizerWrapper asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], eos: int, split: Any):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, eos
        self._split = split

    def __call__(self, text: bytes) -> list[int]:
        return list(self._split(text))


@functools.cache
def byte_tokenizer() -> Any:
    """Llguidance's view of a vocabulary of single bytes."""
    ll = import_llguidance()
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    wrapped = ll.TokenizerWrapper(_Wrapped(tokens, [EOS_BYTE], EOS_BYTE, list))
    return ll.LLTokenizer(wrapped, n_vocab=EOS_BYTE + 1, slices=[])


class Vocabulary:
    """The tokens of one tokenizer.

    Attributes:
        size: ids are below it.
        tokens: bytes of each id; b"" for control tokens and unused ids.
        specials: ids of control tokens by name.
        stops: ids that end a reply.
        words: 32-bit words of a mask.
        text: mask of the tokens that are text.
        content: masks of the tokens that can stand inside of a JSON string and leave it as it was,
            by their characters: whole ones, no quote, no backslash, no control character.
        closers: mask of the tokens with a quote in them.
        most_opened: most brackets that one token opens.
        fillers: characters by the length of their longest run in one token, longest first.
    """

    def __init__(self, tokenizer: TokenizerLike):
        """Read all tokens of `tokenizer`; takes about a second for 160,000."""
        self.size, self.specials = tokenizer.vocab, dict(tokenizer.specials)
        self.stops = tuple(tokenizer.stops)
        self.words = -(-self.size // 32)
        lengths = tokenizer.byte_lengths()
        self.tokens = [tokenizer.decode_bytes([i]) if n else b"" for i, n in enumerate(lengths)]
        self.id_of = {token: i for i, token in enumerate(self.tokens) if token}
        if missing := [byte for byte in range(256) if bytes([byte]) not in self.id_of]:
            raise ConfigError(
                f"schemas need a tokenizer with all bytes; it lacks 0x{missing[0]:02x}"
            )
        self.text = self.pack(self.id_of.values())
        contents: dict[int, list[int]] = {}
        for token, i in self.id_of.items():
            if _is_content(token):
                contents.setdefault(len(token.decode()), []).append(i)
        self.content = {length: self.pack(ids) for length, ids in contents.items()}
        self.closers = self.pack(i for token, i in self.id_of.items() if b'"' in token)
        self.opened = np.zeros(self.size, np.int32)
        for token, i in self.id_of.items():
            self.opened[i] = sum(map(token.count, (b"{", b"[")))
        self.most_opened = int(self.opened.max())
        self.few_opened = [
            self.pack(np.flatnonzero(self.opened <= most)) for most in range(self.most_opened)
        ]
        lengths_of: dict[int, list[int]] = {}
        for token in self.id_of:
            if token.strip(token[:1]) == b"" and len(token) > LONG:
                lengths_of.setdefault(token[0], []).append(len(token))
        self._runs = {b: sorted(lengths) for b, lengths in lengths_of.items()}
        ordered = sorted(FILLERS, key=lambda byte: max(self._runs.get(byte, [0])), reverse=True)
        self.fillers = bytes(ordered)
        self._passing: dict[bytes, dict[int, np.ndarray]] = {}
        self._choose = functools.lru_cache(CACHED)(self._choose_tokens)

    def pack(self, ids: Iterable[int]) -> np.ndarray:
        """The mask of some ids, uint32 [words]."""
        bits = np.zeros(self.words * 32, np.uint8)
        bits[np.fromiter(ids, np.int64)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    @functools.cached_property
    def ll_tokenizer(self) -> Any:
        """Llguidance's view of it."""
        ll = import_llguidance()
        control = set(self.specials.values())
        named = {i: name.encode() for name, i in self.specials.items()}
        tokens, special = [], []
        for i, token in enumerate(self.tokens):
            if not token or i in control:
                special.append(i)
                token = named.get(i, b"<|unused_%d|>" % i)  # noqa: PLW2901
            tokens.append(token)
        wrapped = ll.TokenizerWrapper(_Wrapped(tokens, special, self.stops[0], self.split))
        slices = ll.LLTokenizer.json_slices()
        return ll.LLTokenizer(wrapped, n_vocab=self.size, slices=slices)

    def split(self, text: bytes) -> list[int]:
        """The fewest tokens that spell `text`; of a very long run in front, nearly the fewest."""
        run, text = self._cut_run(text)
        chosen = self._choose(text)[1]
        out, at = list(run), 0
        while at < len(text):
            out.append(chosen[at])
            at += len(self.tokens[chosen[at]])
        return out

    def count(self, text: bytes) -> int:
        """How many tokens `split` takes."""
        run, text = self._cut_run(text)
        return len(run) + self._choose(text)[0][0]

    def count_ends(self, text: bytes, places: Iterable[int]) -> list[int]:
        """How many tokens `split` takes for what follows each of some places near the start."""
        run, rest = self._cut_run(text)
        fewest = self._choose(rest)[0]
        return [len(run) + fewest[place] for place in places]

    def _cut_run(self, text: bytes) -> tuple[list[int], bytes]:
        """Take most of a very long run of one character from the front, as its longest tokens."""
        longest = max(self._runs.get(text[0], [0])) if text else 0
        length = len(text) - len(text.lstrip(text[:1]))
        many = length // longest - 2 if longest else 0
        if many <= 1:
            return [], text
        return [self.id_of[text[:longest]]] * many, text[many * longest :]

    def _choose_tokens(self, text: bytes) -> tuple[list[int], list[int]]:
        """From each place on: the fewest tokens, and the first of them."""
        fewest = [0] * (len(text) + 1)
        chosen = [0] * len(text)
        for start in range(len(text) - 1, -1, -1):
            best = len(text) + 1
            for length in self._lengths(text, start):
                id_ = self.id_of.get(text[start : start + length])
                if id_ is not None and fewest[start + length] < best:
                    best, chosen[start] = fewest[start + length], id_
            fewest[start] = best + 1
        return fewest, chosen

    def _lengths(self, text: bytes, start: int) -> Iterable[int]:
        """Lengths of tokens to try at `start`."""
        left = len(text) - start
        runs = self._runs.get(text[start], ())
        if left <= LONG or not runs or text[start : start + LONG].strip(text[start : start + 1]):
            return range(1, min(left, LONG) + 1)
        return [*range(1, LONG + 1), *(length for length in runs if length <= left)]

    def passing(self, mark: bytes, tail: bytes) -> np.ndarray:
        """Mask of the tokens that would end `mark`, begun at the end of `tail`, and go past it."""
        begun = next((n for n in range(len(mark) - 1, 0, -1) if tail.endswith(mark[:n])), 0)
        masks = self._passing.setdefault(mark, {})
        if begun not in masks:
            rest = mark[begun:]
            inside = [i for text, i in self.id_of.items() if mark in text[:-1]]
            past = [i for text, i in self.id_of.items() if text[:-1].startswith(rest)]
            masks[begun] = self.pack([*inside, *past])
        return masks[begun]


_MADE: "weakref.WeakKeyDictionary[Any, Vocabulary]" = weakref.WeakKeyDictionary()


def open_vocabulary(tokenizer: TokenizerLike) -> Vocabulary:
    """The vocabulary of a tokenizer, read once."""
    vocabulary = _MADE.get(tokenizer)
    if vocabulary is None:
        vocabulary = _MADE[tokenizer] = Vocabulary(tokenizer)
    return vocabulary


def has(mask: np.ndarray, id_: int) -> bool:
    """Whether a mask allows a token."""
    return bool(mask[id_ >> 5] >> np.uint32(id_ & 31) & 1)


def allow(mask: np.ndarray, id_: int) -> None:
    """Let a mask allow a token."""
    mask[id_ >> 5] |= np.uint32(1 << (id_ & 31))


def forbid(mask: np.ndarray, id_: int) -> None:
    """Let a mask forbid a token."""
    mask[id_ >> 5] &= np.uint32(~(1 << (id_ & 31)) & 0xFFFFFFFF)


def list_ids(mask: np.ndarray) -> np.ndarray:
    """The ids that a mask allows."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little").view(bool))


def _is_content(token: bytes) -> bool:
    if b'"' in token or b"\\" in token or any(byte < 0x20 or byte == 0x7F for byte in token):
        return False
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
