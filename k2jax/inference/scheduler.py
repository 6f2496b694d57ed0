"""Which sequences get computed in the next step, and in which pages.

Sequences wait in a queue until a row and pages for all of their tokens are free; then their prompts
are read in chunks that start at multiples of `block`, while others get new tokens, one a step.
Where pages run out, the sequence that began last gives its pages up and is computed again later:
the oldest always ends.
"""

from collections import Counter, deque
from typing import NamedTuple

from k2jax.inference.pages import ROOT, Pages
from k2jax.inference.sequence import Sequence

DRAFTED = -1  # in place of a token: an MTP layer is to guess it


class Part(NamedTuple):
    """Consecutive tokens of one row that a step computes."""

    row: int
    start: int  # position of the first
    tokens: list[int]  # the second of two that decode is DRAFTED
    first_page: int  # place in the row's table of `pages`
    pages: list[int]  # that the table does not have yet
    want: str  # "none", "last" or "all": of which tokens logits are wanted


def is_drafted(part: Part) -> bool:
    """Whether the part has a token and a drafted one behind it."""
    return part.tokens[-1] == DRAFTED


class Work(NamedTuple):
    """What one step computes: parts, and the sequence of each."""

    prefill: list[tuple[Sequence, Part]]
    decode: list[tuple[Sequence, Part]]
    started: list[Sequence]  # whose rows are new


class Shape(NamedTuple):
    """What a runner can hold and compute at once."""

    page: int  # tokens
    block: int  # tokens of a chunk, a multiple of `page`
    pages: int  # of the pool, all parts together
    rows: int
    parts: int = 1  # of the pool; a sequence lies in one
    wanted: int = 1 << 30  # most tokens of a call that logits are wanted of
    checked: int = 0  # most tokens of a call that decodes if some of them are drafted; 0: none are


class Scheduler:
    """The queue, the rows and the pages. Called by one thread."""

    def __init__(self, shape: Shape, prefix_cache: bool = True, deterministic: bool = True):
        """Start empty.

        Args:
            shape: of the runner.
            prefix_cache: share pages between sequences.
            deterministic: pages that a step of decoding computed are neither shared nor replaced
                by a prompt's chunks, since these may round otherwise.
        """
        self.shape, self.deterministic = shape, deterministic
        self.parts = [
            Pages(shape.pages // shape.parts, shape.page, prefix_cache) for _ in range(shape.parts)
        ]
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they began
        self.preemptions = 0
        self._reads_shortest = False
        rows = shape.rows // shape.parts
        self._rows = [
            list(range(part * rows, (part + 1) * rows))[::-1] for part in range(shape.parts)
        ]

    @property
    def room(self) -> int:
        """Tokens of the longest sequence that can be computed."""
        return (self.shape.pages // self.shape.parts - 1) * self.shape.page

    def plan(self, chunks: int, decode_chunks: int) -> Work:
        """Return what to compute next; nothing only if there is nothing to do.

        Args:
            chunks: of prompts, at most, where nobody gets new tokens.
            decode_chunks: at most, where somebody does.
        """
        # The oldest first: who loses its pages to another has not been looked at yet.
        decode = [part for s in list(self.running) if (part := self._decode(s))]
        if self.shape.checked:
            decode = self._add_drafts(decode)
        started = self._admit()
        prefill = self._prefill(decode_chunks if decode else chunks)
        return Work(prefill, decode, started)

    def forget(self) -> None:
        """Be as at the start; called where nothing waits or runs."""
        for part in self.parts:
            part.forget_all()
        self._reads_shortest = False

    def finish(self, sequence: Sequence) -> None:
        """Let a sequence go, wherever it is."""
        if sequence.row >= 0:
            self.running.remove(sequence)
            self._detach(sequence)
        else:
            self.waiting.remove(sequence)

    def number_pages(self, s: Sequence, pages: list[int]) -> list[int]:
        """Return the numbers in the whole pool of pages of a sequence's part."""
        first = s.part * self.parts[0].count
        return [page + first for page in pages] if first else pages

    def _detach(self, s: Sequence) -> None:
        self._rows[s.part].append(s.row)
        self._drop(s)
        s.row, s.sent = -1, 0

    # Decoding.

    def _decode(self, s: Sequence) -> tuple[Sequence, Part] | None:
        if s.row < 0 or s.done < s.target:
            return None
        if s.done == len(s.pages) * self.shape.page and not self._grow(s):
            return None
        known = s.done + 1 < len(s.tokens)
        part = self._part(s, 1, "none" if known else "last")
        s.done += 1
        if not self.deterministic and s.done % self.shape.block == 0:
            self._publish(s)
        return s, part

    def _add_drafts(self, decode: list[tuple[Sequence, Part]]) -> list[tuple[Sequence, Part]]:
        """Add a drafted token where the call has room for one more; the oldest first."""
        tokens = Counter(s.part for s, _ in decode)
        room = self.shape.checked // self.shape.parts
        drafting = []
        for s, plain in decode:
            part = plain
            if part.want == "last" and s.can_draft and tokens[s.part] < room and self._extend(s):
                pages = part.pages + self._part(s, 1, "all").pages
                part = part._replace(tokens=[*part.tokens, DRAFTED], pages=pages, want="all")
                tokens[s.part] += 1
            drafting.append((s, part))
        return drafting

    def _extend(self, s: Sequence) -> bool:
        """Make sure of a page for one more token, at nobody's cost."""
        if s.done < len(s.pages) * self.shape.page:
            return True
        page = self.parts[s.part].take()
        if page is not None:
            s.pages.append(page)
        return page is not None

    def accept_draft(self, s: Sequence) -> None:
        """Note that a drafted token was chosen: it is computed."""
        s.done += 1
        if not self.deterministic and s.done % self.shape.block == 0:
            self._publish(s)

    def _grow(self, s: Sequence) -> bool:
        """Give a sequence one more page, at the cost of those that began last."""
        while (page := self.parts[s.part].take()) is None:
            last = next(other for other in reversed(self.running) if other.part == s.part)
            self.running.remove(last)
            self._detach(last)
            # Tokens that decoding computed are computed so again: others may round otherwise.
            last.target = len(last.request.prompt) - last.unread if self.deterministic else last.end
            self.waiting.appendleft(last)
            self.preemptions += 1
            if last is s:
                return False
        s.pages.append(page)
        return True

    def _part(self, s: Sequence, count: int, want: str) -> Part:
        end = -(-(s.done + count) // self.shape.page)
        pages = self.number_pages(s, s.pages[s.sent : end])
        part = Part(s.row, s.done, s.tokens[s.done : s.done + count], s.sent, pages, want)
        s.sent = max(s.sent, end)
        return part

    # Beginning.

    def _admit(self) -> list[Sequence]:
        started = []
        while self.waiting and self._attach(self.waiting[0]):
            started.append(self.waiting.popleft())
            self.running.append(started[-1])
        return started

    def _attach(self, s: Sequence) -> bool:
        """Give a sequence a row and pages in the part where most of it is, or most is free."""
        need = -(-(s.end + 1 - s.unread) // self.shape.page)
        best: tuple[int, int] | None = None
        for part, rows in enumerate(self._rows):
            if not rows:
                continue
            s.part = part
            while self._share(s):
                pass
            shared = len(s.pages)
            free = self.parts[part].available
            self._drop(s)
            if need - shared <= free and (best is None or (shared, free) > best):
                best, chosen = (shared, free), part
        if best is None:
            return False
        s.part = chosen
        while self._share(s):
            pass
        pages = self.parts[s.part]
        s.pages += [page for _ in range(need - len(s.pages)) if (page := pages.take()) is not None]
        s.row = self._rows[s.part].pop()
        return True

    def _drop(self, s: Sequence) -> None:
        self.parts[s.part].release(s.pages)
        s.pages, s.done, s.entry = [], 0, ROOT
        if s.result is None and not s.new_count:
            s.cached = 0

    def _share(self, s: Sequence) -> bool:
        """Hold the pages of the next block of a prompt if they are kept, in place of its own."""
        block, size, pages = self.shape.block, self.shape.page, self.parts[s.part]
        if s.done + block > min(s.target, s.shareable):
            return False
        entry, hits = s.entry, list[int]()
        for at in range(s.done, s.done + block, size):
            hit = pages.find(entry, tuple(s.tokens[at : at + size]))
            if hit is None:
                pages.release(hits)
                return False
            page, entry = hit
            hits.append(page)
        at = s.done // size
        pages.release(s.pages[at : at + len(hits)])
        s.pages[at : at + len(hits)] = hits
        s.done, s.entry = s.done + block, entry
        if not s.new_count:
            s.cached += block
        return True

    def _publish(self, s: Sequence) -> None:
        """Let others find the block that ends at `done`."""
        size, pages = self.shape.page, self.parts[s.part]
        for at in range(s.done - self.shape.block, s.done, size):
            s.entry = pages.publish(s.pages[at // size], s.entry, tuple(s.tokens[at : at + size]))

    # Prompts.

    def _prefill(self, chunks: int) -> list[tuple[Sequence, Part]]:
        """Read at most so many chunks of prompts.

        Every other one is of the oldest prompt, the rest of the one that needs least: a short
        prompt is not kept waiting by a long one, nor a long one by many short ones.
        """
        reading = [s for s in self.running if s.done < s.target]
        planned: list[tuple[Sequence, Part]] = []
        wanted = self.shape.wanted
        while reading and len(planned) < chunks:
            s = min(reading, key=_left) if self._reads_shortest else reading[0]
            if not self._share(s):
                part = self._chunk(s, wanted)
                if part is None:
                    break
                planned.append((s, part))
                wanted -= {"none": 0, "last": 1, "all": len(part.tokens)}[part.want]
                self._reads_shortest = not self._reads_shortest
            if s.done == s.target:
                reading.remove(s)
        return planned

    def _chunk(self, s: Sequence, wanted: int) -> Part | None:
        """The next chunk of a prompt; None: more logits are wanted than a call can have."""
        count = min(self.shape.block, s.target - s.done)
        end = s.done + count
        prompt = len(s.request.prompt)
        want = "none"
        if s.scored < prompt and s.scored <= end:
            want = "all"
        elif end == s.end:
            want = "last"
        if {"none": 0, "last": 1, "all": count}[want] > wanted:
            return None
        part = self._part(s, count, want)
        s.done = end
        if want == "all":
            s.scored = max(s.scored, min(end + 1, prompt))
        if count == self.shape.block:
            self._publish(s)
        return part


def _left(s: Sequence) -> int:
    return s.target - s.done
