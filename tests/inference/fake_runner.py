"""A runner without a network: logits are a function of a sequence's tokens, read from its pages.

It stores what chunks write into pages and reads it back through the page table, so a wrong page, a
page given to two sequences, a chunk that starts at a wrong place or a missing one all change the
tokens or fail. With it, thousands of steps take a second.
"""

import hashlib

import jax.numpy as jnp
import numpy as np

from k2jax.inference.expert_log import ExpertLog

EMPTY = -1


class FakeRunner:
    """`Runner` for tests of scheduling."""

    def __init__(
        self,
        *,
        pages=64,
        rows=4,
        page=4,
        block=4,
        chunks=4,
        context=256,
        shards=1,
        vocab=97,
        drafts=False,
    ):
        self.page, self.block, self.pages, self.rows = page, block, pages, rows
        self.sizes, self.row_sizes = (1, chunks), (1, rows)
        self.wanted, self.shards, self.context = chunks * block, shards, context
        self.vocab, self.drafts = vocab, drafts
        self.pool = np.full((pages, page), EMPTY)
        self.poison = EMPTY  # sequences with this token have logits that are no numbers
        self.calls: list[tuple[bool, int]] = []
        self.log = ExpertLog(pages, page)  # of each token: itself

    def warm_up(self):
        pass

    def forward(self, chunks, decode=False):
        assert 0 < len(chunks) <= (self.rows if decode else self.sizes[-1])
        self.calls.append((decode, len(chunks)))
        places = {row: (c.start, len(c.tokens), c.pages) for row, c in enumerate(chunks)}
        chosen = np.zeros((len(chunks), self.block, 1, 1), np.int16)
        for row, chunk in enumerate(chunks):
            chosen[row, : len(chunk.tokens), 0, 0] = chunk.tokens
        self.log.add(places, chosen)
        for chunk in chunks:
            assert 1 <= len(chunk.tokens) <= (1 if decode else self.block)
            assert decode or chunk.start % self.block == 0
            assert len({page // (self.pages // self.shards) for page in chunk.pages}) == 1
            for i, token in enumerate(chunk.tokens):
                at = chunk.start + i
                self.pool[chunk.pages[at // self.page], at % self.page] = token
        rows = [y for chunk in chunks for y in self._logits(chunk)]
        size = next(n for n in (1, self.rows, self.wanted) if n >= len(rows))
        padding = [np.full(self.vocab, np.nan, np.float32)] * (size - len(rows))
        return jnp.asarray(np.stack(rows + padding))

    def read_experts(self, pages, count):
        return self.log.read(pages, count)

    def draft(self, chunks):
        """Right for two in three; where the token is not stored yet, as its call comes later."""
        guesses = np.full((self.rows, self.vocab), np.nan, np.float32)
        for y_X, chunk in zip(guesses, chunks, strict=False):
            assert len(chunk.tokens) == 1
            context = [
                self.pool[chunk.pages[i // self.page], i % self.page] for i in range(chunk.start)
            ]
            assert EMPTY not in context, "a token before was never computed"
            y_X[:] = logits([*context, *chunk.tokens], self.vocab, self.poison)
            if (chunk.start + chunk.tokens[0]) % 3 == 0:
                y_X[:] = np.roll(y_X, 1)
        return jnp.asarray(guesses)

    def _logits(self, chunk):
        end = chunk.start + len(chunk.tokens)
        first = {"none": end, "last": end - 1, "all": chunk.start}[chunk.want]
        context = [self.pool[chunk.pages[i // self.page], i % self.page] for i in range(end)]
        assert EMPTY not in context, "a token before was never computed"
        return [logits(context[: at + 1], self.vocab, self.poison) for at in range(first, end)]


def logits(tokens, vocab=97, poison=EMPTY) -> np.ndarray:
    """Of the token after these."""
    seed = hashlib.sha256(bytes(str([int(t) for t in tokens]), "ascii")).digest()[:8]
    y_X = np.random.default_rng(int.from_bytes(seed)).normal(size=vocab) * 3
    if poison in tokens:
        y_X[0] = np.nan
    return y_X.astype(np.float32)


def greedy(prompt, count, vocab=97) -> list[int]:
    """What an engine must answer."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(tokens, vocab).argmax()))
    return tokens[len(prompt) :]
