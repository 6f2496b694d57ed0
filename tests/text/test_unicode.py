"""Halves of surrogate pairs are replaced once, wherever text comes in."""

import pytest

from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.text.train_bpe import train_tokenizer
from k2jax.text.unicode import replace_surrogates, replace_surrogates_in


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("a", "a"),
        ("\u6f22\U0001f600", "\u6f22\U0001f600"),
        ("x\ud83d", "x\ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ("caf\udce9\n", "caf\ufffd\n"),
        ("", ""),
    ],
)
def test_half_a_pair_becomes_a_replacement_and_a_whole_one_its_character(text, valid):
    assert replace_surrogates(text) == valid
    value = {text: [text, {"a": text}, 1, None]}
    assert replace_surrogates_in(value) == {valid: [valid, {"a": valid}, 1, None]}


def test_a_tokenizer_is_trained_on_texts_with_half_a_pair(tmp_path):
    half = train_tokenizer(["half \ud83d of it"] * 3, 600, tmp_path / "a")
    whole = train_tokenizer(["half \ufffd of it"] * 3, 600, tmp_path / "b")
    assert half.digest() == whole.digest()
    assert isinstance(half, Tokenizer)
