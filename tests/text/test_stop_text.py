"""Texts that end an answer are found in any portions, and never passed on in part."""

import random

import pytest

from k2jax.text.stop_text import StopText


def run(stops, portions):
    stop = StopText(stops)
    out = "".join(stop.feed(portion) for portion in portions)
    return out + ("" if stop.matched else stop.close()), stop.matched


@pytest.mark.parametrize(
    ("stops", "text", "kept", "matched"),
    [
        ((), "abc", "abc", ""),
        (("b",), "abc", "a", "b"),
        (("bc", "b"), "abc", "a", "b"),  # complete first
        (("abc", "c"), "xabc", "x", "abc"),  # end together: the longest
        (("aab",), "aaab", "a", "aab"),
        (("abx",), "abab", "abab", ""),
    ],
)
def test_text_ends_before_the_stop_that_is_complete_first(stops, text, kept, matched):
    assert run(stops, [text]) == (kept, matched)
    assert run(stops, list(text)) == (kept, matched)


def test_portions_do_not_matter():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=12))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(2)]
        cuts = sorted(rng.choices(range(13), k=3))
        portions = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
        assert run(stops, portions) == run(stops, [text])
