"""What a tokenizer and a chat template are, whichever format a model's folder has them in."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Part(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    control: bool  # the name of a control token, else ordinary text


class Template(Protocol):
    """Turns a conversation into what the model reads."""

    @property
    def thinks(self) -> bool:
        """Whether assistants' turns may begin with a thought."""

    def parts(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: bool = True,
        variables: Mapping[str, Any] = NOTHING,
    ) -> list[Part]:
        """The conversation, piece by piece; see `k2jax.text.kimi_template.KimiTemplate`."""


class TokenizerLike(Protocol):
    """Text to ids and back: `Tokenizer` (tiktoken.model) or `HfTokenizer` (tokenizer.json)."""

    vocab: int  # ids are below it
    bos: int
    eos: int
    stops: tuple[int, ...]  # ids that end a reply or a document
    specials: dict[str, int]  # control tokens by name
    template: Template | None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`; names of control tokens are only read as such if `special`."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on all cores."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of token ids."""

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text each id stands for, int32 [vocab]; 0 for control tokens."""


def check_ids(ids: Iterable[int], vocab: int) -> list[int]:
    """See that ids are in 0..vocab-1; the ids as Python's integers.

    Raises:
        ValueError: one is outside 0..vocab-1.
    """
    integers = [int(i) for i in ids]
    if wrong := [i for i in integers if not 0 <= i < vocab]:
        raise ValueError(f"token id {wrong[0]} is outside 0..{vocab - 1}")
    return integers
