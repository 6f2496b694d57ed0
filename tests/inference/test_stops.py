"""Text comes out whole, as early as it is certain, and ends before the stop text."""

import random

import pytest

from k2jax.inference.stops import TextCutter
from k2jax.text.kimi_tokenizer import Tokenizer

BYTES = Tokenizer({bytes([i]): i for i in range(256)})


def cut(text: str, stops: list[str], sizes: random.Random | None = None):
    """What comes out of a text fed in portions: the text and the stop."""
    cutter, ids, out = TextCutter(BYTES, stops), list(text.encode()), ""
    while ids:
        count = sizes.randint(1, 5) if sizes else 1
        new, stop = cutter.feed(ids[:count])
        out += new
        if stop:
            return out, stop
        ids = ids[count:]
    return out + cutter.close(), None


def expected(text: str, stops: list[str]):
    """The same by looking at one more character at a time."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize(
    ("text", "stops", "out"),
    [
        ("say \n\nUser: x", ["\n\nUser:"], ("say ", "\n\nUser:")),
        ("aab", ["ab"], ("a", "ab")),
        ("abc", ["abc", "b"], ("a", "b")),  # complete first
        ("xab", ["ab", "b"], ("x", "ab")),  # complete together: the longer
        ("ünö€", ["€"], ("ünö", "€")),
        ("nothing", ["none"], ("nothing", None)),
        ("ends in no", ["none"], ("ends in no", None)),
        ("free", [], ("free", None)),
    ],
)
def test_text_ends_before_the_stop_that_is_complete_first(text, stops, out):
    assert cut(text, stops) == out


def test_portions_do_not_matter():
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choice("abü") for _ in range(draw.randint(0, 12)))
        stops = ["".join(draw.choice("abü") for _ in range(draw.randint(1, 3))) for _ in range(2)]
        assert cut(text, stops, draw) == expected(text, stops), (text, stops)


def test_certain_text_is_not_held_back():
    cutter = TextCutter(BYTES, ["\n\n"])
    assert cutter.feed(b"ab") == ("ab", None)
    assert cutter.feed(b"c\n") == ("c", None)
    assert cutter.feed(b"d") == ("\nd", None)


def test_a_part_of_a_character_waits_and_is_replaced_at_the_end():
    cutter = TextCutter(BYTES)
    assert cutter.feed("ü".encode()[:1]) == ("", None)
    assert cutter.close() == "\ufffd"
