"""Pages: nobody shares what is not equal, nothing leaks, the oldest idle page goes first."""

import random

from k2jax.inference.pages import ROOT, Pages


def take(pages: Pages, prompt: list[int]) -> list[int]:
    """Hold the pages of a prompt's full blocks, shared where they are found."""
    held, entry = [], ROOT
    for at in range(0, len(prompt) - pages.size + 1, pages.size):
        tokens = tuple(prompt[at : at + pages.size])
        if hit := pages.find(entry, tokens):
            page, entry = hit
        else:
            page = pages.take()
            entry = pages.publish(page, entry, tokens)
        held.append(page)
    return held


def test_equal_beginnings_share_pages_and_nothing_else_does():
    pages = Pages(10, 2)
    first = take(pages, [1, 2, 3, 4, 5, 6])
    assert take(pages, [1, 2, 3, 4, 9, 9])[:2] == first[:2]
    assert not set(take(pages, [3, 4, 5, 6])) & set(first)  # the same tokens at another place


def test_a_page_stays_for_later_prompts_until_it_is_needed():
    pages = Pages(4, 2)
    first = take(pages, [1, 2, 3, 4])
    pages.release(first)
    assert (pages.idle, pages.available) == (2, 3)
    assert take(pages, [1, 2, 3, 4]) == first
    pages.release(first)
    assert pages.take() not in first
    assert pages.take() == first[1]  # the end goes before the beginning
    assert take(pages, [1, 2]) == first[:1]
    assert pages.take() is None


def test_the_page_left_longest_ago_goes_first():
    pages = Pages(4, 1)
    held = [take(pages, [token]) for token in (7, 8, 9)]
    for page in (held[1], held[0], held[2]):
        pages.release(page)
    assert take(pages, [8]) == held[1]  # used again
    pages.release(held[1])
    assert [pages.take() for _ in range(3)] == [held[0][0], held[2][0], held[1][0]]


def test_a_page_behind_a_forgotten_one_is_not_reached():
    pages = Pages(4, 1)
    first = take(pages, [1, 2])
    pages.release(first[:1])  # the beginning goes alone
    assert {pages.take(), pages.take()} == {3, first[0]}
    assert pages.find(ROOT, (1,)) is None
    entry = pages.publish(first[0], ROOT, (1,))
    assert pages.find(entry, (2,)) is None


def test_without_keeping_nothing_is_found():
    pages = Pages(4, 1, keep=False)
    pages.release(take(pages, [1, 2]))
    assert pages.find(ROOT, (1,)) is None and pages.idle == 0 and pages.available == 3


def test_two_that_compute_the_same_page_publish_one():
    pages = Pages(5, 1)
    ours, theirs = pages.take(), pages.take()
    assert pages.publish(ours, ROOT, (1,)) == pages.publish(theirs, ROOT, (1,))
    pages.release([theirs])
    assert pages.find(ROOT, (1,))[0] == ours


def test_no_page_is_lost_or_held_twice_by_any_order_of_use():
    draw = random.Random(0)
    pages, running = Pages(40, 2), []
    for _ in range(5_000):
        prompt = [draw.randrange(2) for _ in range(2 * draw.randrange(1, 6))]
        if pages.available >= 5 and draw.random() < 0.55:
            running.append((prompt, take(pages, prompt)))
        elif running:
            pages.release(running.pop(draw.randrange(len(running)))[1])
        holders = {}
        for prompt, held in running:
            for at, page in enumerate(held):
                assert page > 0
                assert holders.setdefault(page, prompt[: 2 * at + 2]) == prompt[: 2 * at + 2]
        assert len(holders) + pages.available == 39
    for _, held in running:
        pages.release(held)
    assert pages.available == 39
