"""A sequence's numbers depend on itself alone, to the last bit."""

import numpy as np
import pytest

from k2jax.config import ModelConfig
from k2jax.inference.runner import Chunk, Runner
from k2jax.model import Kimi, Model
from k2jax.params.arrays import initial
from k2jax.params.declare import specs

# Wide enough for products whose sums XLA cuts in another way when they have more rows.
CFG = ModelConfig(
    vocab=256,
    embed=256,
    dense_layers=1,
    moe_layers=1,
    heads=4,
    q_rank=96,
    kv_rank=64,
    nope=16,
    rope=8,
    value=16,
    ffw=704,
    experts=8,
    expert_ffw=64,
    experts_per_token=2,
    context=128,
    init_std=0.1,
)
BLOCK, NEW = 16, 3
PROMPTS = (7, 16, 17, 40, 90)


@pytest.fixture(scope="module")
def runner() -> Runner:
    params = initial(specs(Kimi(CFG)), 0, CFG.init_std)
    return Runner(Model(CFG, params), rows=12, pages=64, chunks=8)


ROWS = [
    np.random.default_rng(length).integers(1, CFG.vocab, length + NEW).tolist()
    for length in PROMPTS
]


def cut(number: int, pages: list[int], want: str = "last") -> list[Chunk]:
    end = PROMPTS[number]
    return [
        Chunk(ROWS[number][at : min(at + BLOCK, end)], at, pages, want)
        for at in range(0, end, BLOCK)
    ]


def run_alone(runner: Runner, number: int, first_page: int, split: int) -> np.ndarray:
    """Logits after the prompt and after each new token, nothing else running."""
    pages = list(range(first_page, first_page + 8))
    chunks = cut(number, pages)
    for at in range(0, len(chunks), split):
        last = runner.forward(chunks[at : at + split])
    logits = [np.asarray(last)[len(chunks[at : at + split]) - 1]]
    for at in range(PROMPTS[number], PROMPTS[number] + NEW):
        token = Chunk(ROWS[number][at : at + 1], at, pages, "last")
        logits.append(np.asarray(runner.forward([token], decode=True))[0])
    return np.stack(logits)


def run_crowded(runner: Runner, others: int) -> list[np.ndarray]:
    """The same of all sequences in the same calls, with as many others."""
    tables = [list(range(8 * i + 1, 8 * i + 9)) for i in range(len(PROMPTS))]
    waiting = [(i, chunk) for i in reversed(range(len(PROMPTS))) for chunk in cut(i, tables[i])]
    last = {}
    for at in range(0, len(waiting), 7):
        part = waiting[at : at + 7]
        y_NX = np.asarray(runner.forward([chunk for _, chunk in part]))
        last |= {i: y_X for (i, _), y_X in zip(part, y_NX, strict=False)}
    logits = [[last[i]] for i in range(len(PROMPTS))]
    other = [Chunk([5], 3, [60], "last")] * others
    for n in range(NEW):
        chunks = [
            Chunk([ids[end + n]], end + n, pages, "last")
            for ids, end, pages in zip(ROWS, PROMPTS, tables, strict=True)
        ]
        y_NX = np.asarray(runner.forward([*other, *chunks], decode=True))[others:]
        for row, y_X in zip(logits, y_NX, strict=False):
            row.append(y_X)
    return [np.stack(row) for row in logits]


@pytest.mark.parametrize("others", [0, 7])
def test_neighbours_change_no_bit(runner, others):
    crowded = run_crowded(runner, others)
    for number, ours in enumerate(crowded):
        np.testing.assert_array_equal(ours, run_alone(runner, number, 3, split=8))


def test_a_prefix_read_in_another_call_changes_no_bit(runner):
    whole = run_alone(runner, 4, 1, split=8)
    np.testing.assert_array_equal(whole, run_alone(runner, 4, 20, split=1))


def test_logits_of_all_tokens_are_those_of_the_last_alone(runner):
    chunks = cut(3, list(range(1, 9)), want="all")
    y_NX = np.asarray(runner.forward(chunks))
    np.testing.assert_array_equal(y_NX[PROMPTS[3] - 1], run_alone(runner, 3, 1, split=8)[0])


def test_what_was_left_in_a_page_is_never_seen(runner):
    clean = run_alone(runner, 0, 1, split=8)
    runner._pool = tuple(tuple(a * np.nan for a in stack) for stack in runner._pool)
    np.testing.assert_array_equal(clean, run_alone(runner, 0, 1, split=8))
