"""Train a small tokenizer in Kimi's format."""

import os
from collections.abc import Iterable
from typing import Any

from k2jax.config import ConfigError
from k2jax.text.hf_tokenizer import printable_bytes
from k2jax.text.kimi_tokenizer import PATTERN, SPECIALS, Tokenizer, cut_pieces
from k2jax.text.unicode import replace_surrogates


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


def make_bpe(base: int) -> tuple[Any, Any]:
    """Make an untrained tokenizer with Kimi's pre-split, and its trainer (package `tokenizers`)."""
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
    bpe, trainer = make_bpe(base)
    valid = (replace_surrogates(text) for text in texts)
    bpe.train_from_iterator((piece for text in valid for piece in cut_pieces(text)), trainer)
    byte = printable_bytes()
    # An id there is the order in which a token was made, which is what a rank means here.
    return {bytes(byte[c] for c in token): rank for token, rank in bpe.get_vocab().items()}
