"""What every process computes in a step: latents, logits, and the tokens that are chosen."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from k2jax.inference.request import TOP_LOGPROBS, Sampling
from k2jax.inference.runner import Chunk
from k2jax.inference.sampler import (
    Sampler,
    log_probabilities,
    pick_likeliest,
    put_rows,
    take_rows,
)
from k2jax.inference.scheduler import Part, is_drafted
from k2jax.runtime import memory

REJECTED = -3  # in place of a token: what was drafted before it was not chosen


class RunnerLike(Protocol):
    """What computes logits: `k2jax.inference.runner.Runner`, or a stand-in of a test."""

    page: int
    block: int
    pages: int
    shards: int
    rows: int
    sizes: tuple[int, ...]
    row_sizes: tuple[int, ...]
    wanted: int
    context: int
    drafts: bool

    def warm_up(self) -> None:
        """Compile what can be."""

    def set_weights(self, params: dict[str, jax.Array]) -> None:
        """Compute with other weights of the same model."""

    def forward(self, chunks: Sequence[Chunk], decode: bool = False) -> jax.Array:
        """Read chunks; the logits of the wanted tokens, in order, then any rows."""

    def draft(self, chunks: Sequence[Chunk]) -> jax.Array:
        """Guess what follows sequences' newest tokens: logits, in order, then any rows."""

    def read_experts(self, pages: Sequence[int], count: int) -> np.ndarray:
        """Return the experts of the first tokens in pages, where they are kept."""


class Begin(NamedTuple):
    """A sequence that gets a row."""

    row: int
    sampling: Sampling
    prompt: Sequence[int]
    new: Sequence[int]  # tokens that it has already


class Call(NamedTuple):
    """One call of the runner, and what becomes of its logits."""

    parts: Sequence[Part]
    decode: bool
    # Of each token with logits, in order: the one that follows, where it is known, else -1.
    targets: Sequence[int]
    picks: bool  # whether any token is to be chosen
    top: int  # log-probabilities of so many likeliest tokens; 0: none


class Plan(NamedTuple):
    """All of one step."""

    begun: Sequence[Begin]
    calls: Sequence[Call]
    constrained: bool = False  # whether a sequence that gets a token has a constraint


class Answer(NamedTuple):
    """What a call gives, for each token with logits, in order."""

    tokens: np.ndarray | None  # int32, chosen ones; below 0: see `sampler`, or REJECTED
    logprobs: np.ndarray | None  # see `log_probabilities`


Masks = Mapping[int, np.ndarray]


class Executor:
    """A runner, the page tables of its rows, and how they choose tokens."""

    def __init__(self, runner: RunnerLike, vocab: int, allowed: int):
        """Take a runner over.

        Args:
            runner: nobody else may call it.
            vocab: logits of a token.
            allowed: ids below it may be chosen.
        """
        self.runner, self._allowed = runner, allowed
        # Rows that are chosen for at once: a call has no more, checked drafts included.
        self._picked = max(runner.row_sizes[-1], runner.sizes[-1])
        self._sampler = Sampler(runner.rows, vocab, allowed, self._picked)
        pages = -(-(runner.context + runner.block) // runner.page)
        self._tables: Any = np.zeros((runner.rows, pages), np.int32)

    def warm_up(self) -> None:
        """Compile all that any request may need, by running it on scratch."""
        with _keep_small_programs():
            self.runner.warm_up()
            self._run_all()
        gc.collect()
        memory.trim_malloc()  # of loading and compiling

    def _run_all(self) -> None:
        block, page = self.runner.block, self.runner.page
        sizes = self.runner.sizes
        calls = [(n, 1, "last", True) for n in self.runner.row_sizes]
        calls += [(n, block, "last", False) for n in sizes]
        calls += [(n, block, "all", False) for n in sizes]
        warm: set[int] = set()
        for count, tokens, want, decode in calls:
            chunk = Chunk([0] * tokens, 0, [0] * -(-tokens // page), want)
            y_BX = self.runner.forward([chunk] * count, decode)
            if decode and self.runner.drafts:
                guess_BX = self.runner.draft([chunk] * count)
                with _mesh_of(guess_BX):
                    jax.block_until_ready(pick_likeliest(guess_BX, allowed=self._allowed))
            if y_BX.shape[0] not in warm:
                warm.add(y_BX.shape[0])
                with _mesh_of(y_BX):
                    jax.block_until_ready([run() for run in self._sampler.programs(y_BX)])

    def run(self, plan: Plan, mask: Callable[[], Masks]) -> list[Answer]:
        """Compute a step.

        Args:
            plan: the same in every process.
            mask: called once, while the device computes: allowed tokens by row.
        """
        for begin in plan.begun:
            self._sampler.begin(*begin)
        drafted = [self._draft(call) for call in plan.calls]
        logits = [self._forward(*pair) for pair in zip(plan.calls, drafted, strict=True)]
        masks = mask()
        chosen = [self._choose(*pair, masks) for pair in zip(plan.calls, logits, strict=True)]
        answers = [Answer(*pair) for pair in jax.device_get(chosen)]
        if not any(call.targets for call in plan.calls):
            jax.block_until_ready(logits)  # hosts do not run ahead of their devices
        checked = zip(plan.calls, answers, drafted, strict=True)
        return [self._accept(*each) for each in checked]

    def _draft(self, call: Call) -> dict[int, int]:
        """Have the next but one token of rows guessed; 0 for one that cannot be."""
        parts = [part for part in call.parts if is_drafted(part)]
        if not parts:
            return {}
        chunks = [self._chunk(part, part.start, part.tokens[:1], "last") for part in parts]
        y_BX = self.runner.draft(chunks)
        with _mesh_of(y_BX):
            tokens = jax.device_get(pick_likeliest(y_BX, allowed=self._allowed))
        return {part.row: max(int(i), 0) for part, i in zip(parts, tokens, strict=False)}

    def _forward(self, call: Call, drafted: Mapping[int, int]) -> jax.Array:
        chunks = []
        for part in call.parts:
            if is_drafted(part):
                # One token a chunk: the numbers of both are those of plain decoding.
                for place, token in enumerate((part.tokens[0], drafted[part.row])):
                    chunks.append(self._chunk(part, part.start + place, [token], "last"))
            else:
                chunks.append(self._chunk(part, part.start, part.tokens, part.want))
        return self.runner.forward(chunks, call.decode)

    def _chunk(self, part: Part, start: int, tokens: Sequence[int], want: str) -> Chunk:
        table = self._tables[part.row]
        if part.pages:
            table[part.first_page : part.first_page + len(part.pages)] = part.pages
        end = -(-(start + len(tokens)) // self.runner.page)
        return Chunk(tokens, start, table[:end], want)

    def _choose(self, call: Call, y_BX: jax.Array, masks: Masks) -> tuple[Any, Any]:
        if not call.targets:
            return None, None
        with _mesh_of(y_BX):
            tokens = self._pick(call, y_BX, masks) if call.picks else None
            if not call.top:
                return tokens, None
            known = np.full(y_BX.shape[0], -1, np.int32)
            known[: len(call.targets)] = call.targets
            top = 1 if call.top == 1 else TOP_LOGPROBS
            chosen = known if tokens is None else tokens
            return tokens, log_probabilities(y_BX, known, chosen, top=top)

    def _pick(self, call: Call, y_BX: jax.Array, masks: Masks) -> jax.Array:
        """Choose the tokens of all rows, or, of scored prompts, only where none is known."""
        rows = rows_of(call)
        if len(y_BX) <= self._picked:
            return self._sampler.pick(y_BX, rows, masks, _ahead_of(call))
        open_rows = [at for at, target in enumerate(call.targets) if target < 0]
        taken = np.full(self._picked, len(y_BX), np.int32)
        taken[: len(open_rows)] = open_rows
        picked = self._sampler.pick(take_rows(y_BX, taken), [rows[at] for at in open_rows], masks)
        return put_rows(picked, taken, size=len(y_BX))

    def _accept(self, call: Call, answer: Answer, drafted: Mapping[int, int]) -> Answer:
        """Note the chosen tokens, and mark those that follow a wrong draft."""
        if answer.tokens is None:
            return answer
        tokens = answer.tokens.tolist()
        ahead = _ahead_of(call)
        for at, (row, target) in enumerate(zip(rows_of(call), call.targets, strict=True)):
            if ahead[at] and tokens[at - 1] != drafted[row]:
                tokens[at] = REJECTED
            if target < 0 <= tokens[at]:
                self._sampler.accept(row, tokens[at])
        return answer._replace(tokens=np.array(tokens, np.int32))


@contextlib.contextmanager
def _keep_small_programs() -> Iterator[None]:
    """Cache programs that compile fast too: together they take most of a start."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0.0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def rows_of(call: Call) -> list[int]:
    """Return the row of each token with logits, in order."""
    rows = []
    for part in call.parts:
        if part.want == "last":
            rows.append(part.row)
        elif part.want == "all":
            rows += [part.row] * len(part.tokens)
    return rows


def _ahead_of(call: Call) -> list[int]:
    """Return of each token with logits how many new ones its row gets before it."""
    ahead: list[int] = []
    for part in call.parts:
        ahead += {"none": [], "last": [0], "all": [0] * len(part.tokens)}[part.want]
        if is_drafted(part):
            ahead[-1] = 1
    return ahead


def _mesh_of(a: jax.Array) -> contextlib.AbstractContextManager[Any]:
    """Use the mesh that an array lies on, whatever other one is in use."""
    layout = getattr(a, "sharding", None)  # of a runner without a device: none
    if isinstance(layout, jax.NamedSharding) and isinstance(layout.mesh, jax.sharding.Mesh):
        return jax.set_mesh(layout.mesh)
    return contextlib.nullcontext()
