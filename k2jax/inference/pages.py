"""Who holds which page of the latent cache, and which pages begin which prompts.

A page has the latents of `size` consecutive tokens. Full pages of prompts are kept by what they
hold: an entry is the tokens of one page behind the entry of the page before it, so equal keys mean
equal prompts from the first token on, and no hash can be mistaken. Such a page is shared by all
sequences that begin alike; once nobody holds it, it stays until a page is needed, and the one that
was left longest ago goes first. Page 0 is scratch: padding writes there, nobody holds it.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence

ROOT = 0  # the entry before a prompt's first page


class Pages:
    """Hands out pages, counts who holds them, and finds those that begin a prompt."""

    def __init__(self, count: int, size: int, keep: bool = True):
        """Start with all pages free.

        Args:
            count: pages, scratch included.
            size: tokens of a page.
            keep: whether `publish` keeps pages for other sequences.
        """
        self.count, self.size, self.keep = count, size, keep
        self._free = deque(range(1, count))
        self._holders = [0] * count
        self._entry_of = [ROOT] * count  # of a published page
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}  # by entry
        self._page_of: dict[tuple[int, tuple[int, ...]], int] = {}  # by key
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, nobody holds; oldest first
        self._entries = ROOT

    @property
    def available(self) -> int:
        """Pages that can be taken now, those that are kept for nobody yet included."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages that only the prefix cache holds."""
        return len(self._idle)

    def take(self) -> int | None:
        """Return a page for one holder, maybe one that was kept; None: all are held."""
        if self._free:
            page = self._free.popleft()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._holders[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages, first to last.

        Later pages go before those they follow: alone they begin nothing.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if self._entry_of[page]:
                self._idle[page] = None
            else:
                self._free.append(page)

    def find(self, entry: int, tokens: tuple[int, ...]) -> tuple[int, int] | None:
        """Return the page of `tokens` behind an entry, held once more, and its own entry."""
        page = self._page_of.get((entry, tokens))
        if page is None:
            return None
        if not self._holders[page]:
            del self._idle[page]
        self._holders[page] += 1
        return page, self._entry_of[page]

    def publish(self, page: int, entry: int, tokens: tuple[int, ...]) -> int:
        """Let other sequences find a held page; its entry.

        Where another page already has these tokens, that one stays the one to find.
        """
        if not self.keep:
            return ROOT
        key = entry, tokens
        if key in self._page_of:
            return self._entry_of[self._page_of[key]]
        self._entries += 1
        self._entry_of[page], self._key_of[self._entries] = self._entries, key
        self._page_of[key] = page
        return self._entries

    def forget_all(self) -> None:
        """Keep nothing for later sequences; nobody may hold a page."""
        for page in list(self._idle):
            self._forget(page)
            self._free.append(page)
        self._idle.clear()

    def _forget(self, page: int) -> None:
        """Nobody finds this page from now on, nor, by it, those behind it."""
        del self._page_of[self._key_of.pop(self._entry_of[page])]
        self._entry_of[page] = ROOT
