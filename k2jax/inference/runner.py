"""Run chunks of sequences through compiled programs of a few fixed sizes.

The runner holds the weights and the pool of latents on the device; the engine decides which
sequences have which pages. Calls are padded to the next program's size.

A token's numbers depend on its own sequence alone. On CPUs in float32 they do so to the last bit,
whatever else is in the call, and whatever program it takes. Rows of a product do not see each
other, but how XLA adds up a row depends on their number (jax 0.10.2, products by YNN, depths of 64
to 704): the result has the same bits at 2..16 rows, other ones for one row (a loop of LLVM's, from
256 columns or so), and again other ones, the same for all numbers, at 64 rows and more; in between
they change with the depth. The place of a row never matters. So programs that decode have 2 to 16
rows, more are several calls, and programs that read prompts have 64 rows or more. Experts always
run on blocks of one size, attention goes by blocks of keys from the first one on, and sums along a
row, which YNN would take over from 4,096 numbers on, stay with XLA. That costs little: a second row
is free (16 MB of weights: 0.53 ms for two rows, 0.73 ms for one), a prompt of up to 48 tokens pays
for 64 in all products but those of its experts. A prompt's numbers differ from those of a token
that is decoded, in the last bits: pages of the one must not stand in for the other's.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.config import ConfigError, ModelConfig
from k2jax.inference import forward as network
from k2jax.inference.cache import Pool, make_pool
from k2jax.inference.expert_log import ExpertLog
from k2jax.inference.paged_attention import Chunks
from k2jax.inference.placement import batch_ways, decoding, lay_out
from k2jax.model import Model
from k2jax.model.projection import Policy
from k2jax.params.arrays import Params
from k2jax.runtime.versions import cpu_flags
from k2jax.sharding import meshless, reshard, use_mesh_of

# Rows of programs that decode, at least and at most, and least rows of those that read prompts, on
# a device. Accelerators promise no bits.
CPU_DECODE_ROWS, CPU_PREFILL_ROWS = (2, 16), 64


class Chunk(NamedTuple):
    """Some consecutive tokens of one sequence."""

    tokens: Sequence[int]  # 1..runner.block
    start: int  # position of the first; of a prompt's chunk a multiple of runner.block
    pages: Sequence[int]  # of its sequence so far, in order; cover start + len(tokens)
    want: str  # "none", "last" or "all": of which tokens logits are wanted


class Size(NamedTuple):
    """What one program is compiled for."""

    chunks: int
    tokens: int  # of each chunk
    wanted: int  # tokens with logits
    guesses: bool = False  # by the first MTP layer, not by the network


class Network(NamedTuple):
    """What programs compute, but for the shapes."""

    cfg: ModelConfig
    policy: Policy
    tree: jax.tree_util.PyTreeDef  # of the weights
    head_rows: int
    row_exact: bool  # a row's bits do not depend on the number of rows
    experts: bool  # whether they return the experts of each token


class Runner:
    """A model, a pool of latents, and the programs that read and extend it.

    Attributes:
        page: tokens of a page.
        block: most tokens of a chunk, a multiple of `page`.
        pages: of the pool, the first of which is scratch.
        shards: equal parts of the pool, one a device, each with a scratch page first; a sequence
            has its pages in one of them.
        rows: most sequences of a call that decodes.
        row_sizes: tokens of the programs that decode, ascending; calls are padded to the next.
        sizes: chunks of calls that read prompts, ascending; calls are padded to the next.
        wanted: most tokens of which a call can give logits.
        context: most tokens of a sequence.
        drafts: whether `draft` can be called.
    """

    def __init__(
        self,
        model: Model,
        *,
        rows: int,
        pages: int,
        page: int = 16,
        block: int = 16,
        chunks: int = 16,
        drafts: bool = False,
    ):
        """Make an empty pool; nothing is compiled.

        Args:
            model: weights, on the mesh on which to compute.
            rows: most sequences of a call that decodes.
            pages: of the pool, scratch included.
            page: tokens of a page.
            block: tokens of a prompt's chunk, a multiple of `page`.
            chunks: most chunks of a call that reads prompts.
            drafts: whether to keep what the first MTP layer needs to guess tokens; without
                effect where the model has none.
        """
        if block % page:
            raise ConfigError(f"block is {block}; it must be a multiple of the page, {page} tokens")
        self.page, self.block, self.pages = page, block, pages
        self._cfg, self._policy = model.config, Policy(model.dtype)
        self.context = model.config.context
        self.drafts = drafts and model.config.mtp_layers > 0
        with use_mesh_of(*model.params.values()), decoding(model.params, model.config) as params:
            self._params = params
            self._mesh = None if meshless() else jax.sharding.get_mesh()
            self.shards = batch_ways()
        if pages % self.shards:
            raise ConfigError(f"pages is {pages}; {self.shards} devices must divide it")
        self._cpu = jax.default_backend() == "cpu"
        decoded = rows * (1 + self.drafts)
        least, most = CPU_DECODE_ROWS if self._cpu else (1, decoded)
        self.row_sizes = self._list_sizes(least, min(most, -(-decoded // self.shards)))
        least = -(-CPU_PREFILL_ROWS // block) if self._cpu else 1
        self.sizes = self._list_sizes(least, -(-chunks // self.shards))
        self.rows, self.wanted = rows, self.sizes[-1] * block
        self._log: ExpertLog | None = None
        self._programs: dict[Size, jax.stages.Compiled] = {}
        self._pool: Pool | None = None

    def widen(self) -> None:
        """Read and decode all rows in one call, on CPUs too: a token's bits depend on the others'.

        Few sizes of programs, so that few are compiled. Call it before anything is read.
        """
        decoded = self.rows * (1 + self.drafts)
        self.row_sizes = self._list_sizes(*_fit_least(decoded, self.shards), factor=4)
        self.sizes = self._list_sizes(*_fit_least(self.rows, self.shards), factor=4)
        self.wanted = self.sizes[-1] * self.block

    def keep_experts(self) -> None:
        """Keep the experts of every token, for `read_experts`; called before anything is read."""
        self._log = ExpertLog(self.pages, self.page)

    def warm_up(self) -> None:
        """Compile the programs that decode and those that read prompts."""
        for tokens, sizes in ((1, self.row_sizes), (self.block, self.sizes)):
            for count in sizes:
                self._program(Size(count, tokens, count))
        for count in self.row_sizes if self.drafts else ():
            self._program(Size(count, 1, count, True))

    def forward(self, chunks: Sequence[Chunk], decode: bool = False) -> jax.Array:
        """Read chunks: logits of the wanted tokens in order, float32 [at least these, vocab].

        Args:
            chunks: of any sequences, several of one included; each has its own `start`, and sees
                what the others write.
            decode: whether they have one new token each. Prompts are read by other products, and a
                chunk of one token may be a prompt's last: numbers agree, but not to the last bit.
        """
        tokens, sizes = (1, self.row_sizes) if decode else (self.block, self.sizes)
        return self._run(chunks, tokens, sizes)

    def draft(self, chunks: Sequence[Chunk]) -> jax.Array:
        """Guess what follows the newest token of sequences, of which all before it is computed.

        Args:
            chunks: that token of each.

        Returns:
            Logits as `forward` gives them, of the first MTP layer.
        """
        return self._run(chunks, 1, self.row_sizes, guesses=True)

    def _run(
        self,
        chunks: Sequence[Chunk],
        tokens: int,
        sizes: tuple[int, ...],
        guesses: bool = False,
    ) -> jax.Array:
        # A part of the pool has at most its share of a call's chunks.
        share, seen = sizes[-1] // self.shards, Counter[int]()
        calls: dict[int, dict[int, tuple[int, Chunk]]] = {}
        for i, chunk in enumerate(chunks):
            part = self._part(chunk)
            call, number = divmod(seen[part], share)
            seen[part] += 1
            calls.setdefault(call, {})[i] = number, chunk
        logits = [
            self._call(list(calls[call].values()), tokens, sizes, guesses) for call in sorted(calls)
        ]
        if len(calls) == 1:
            return logits[0]
        with self._on_mesh():
            return _put_in_order(logits, calls)

    def set_weights(self, params: Params) -> None:
        """Compute with other weights of the same model from now on.

        On the same mesh they are the arrays themselves, but for layers of shallow stacks; from
        another one they are laid out anew.
        """
        self._params = lay_out(params, self._cfg, self._mesh)
        if self._pool is not None:
            with self._on_mesh():
                self._order_weights()

    def read_experts(self, pages: Sequence[int], count: int) -> np.ndarray:
        """Return the experts of the first tokens in pages, int16 [count, layers, a token]."""
        assert self._log is not None
        return self._log.read(pages, count)

    def _part(self, chunk: Chunk) -> int:
        return int(chunk.pages[0]) * self.shards // self.pages

    def _call(
        self,
        placed: list[tuple[int, Chunk]],
        tokens: int,
        sizes: tuple[int, ...],
        guesses: bool,
    ) -> jax.Array:
        share = 1 + max(number for number, _ in placed)
        count = next(n for n in sizes if n >= share * self.shards)
        slots = {
            self._part(chunk) * (count // self.shards) + number: chunk for number, chunk in placed
        }
        wanted = _list_wanted(slots, tokens)
        size = Size(count, tokens, count if len(wanted) <= count else count * tokens, guesses)
        program = self._program(size)
        logits, self._pool, expert_BTLK = program(
            self._weights, self._pool, self._pad(slots, wanted, size)
        )
        if self._log is not None and expert_BTLK is not None:
            places = {slot: (c.start, len(c.tokens), c.pages) for slot, c in slots.items()}
            self._log.add(places, expert_BTLK)
        return logits

    def _pad(self, slots: Mapping[int, Chunk], wanted: list[int], size: Size) -> Chunks:
        token_BT = np.zeros((size.chunks, size.tokens), np.int32)
        start_B, count_B = np.zeros((2, size.chunks), np.int32)
        table = np.zeros((size.chunks, -(-self.context // self.page)), np.int32)
        for slot, chunk in slots.items():
            token_BT[slot, : len(chunk.tokens)] = chunk.tokens
            table[slot, : len(chunk.pages)] = np.asarray(chunk.pages) % (self.pages // self.shards)
            start_B[slot], count_B[slot] = chunk.start, len(chunk.tokens)
        wanted_N = np.full(size.wanted, -1, np.int32)
        wanted_N[: len(wanted)] = wanted
        return Chunks(token_BT, start_B, count_B, table, wanted_N)

    def _program(self, size: Size) -> jax.stages.Compiled:
        if size not in self._programs:
            with self._on_mesh():
                if self._pool is None:
                    self._prepare()
                arrays = (self._weights, self._pool, self._pad({}, [], size))
                described, layout = jax.tree.flatten(jax.tree.map(_describe, arrays))
                rows = CPU_PREFILL_ROWS if self._cpu and size.tokens > 1 else 0
                logs = self._log is not None
                net = Network(self._cfg, self._policy, self._tree, rows, self._cpu, logs)
                self._programs[size] = _compile(
                    net, layout, tuple(described), self._mesh, size.guesses
                )
        return self._programs[size]

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    def _prepare(self) -> None:
        """Put the weights in order and make the pool."""
        cfg = self._cfg
        # XLA's CPU backend would convert a pool of bfloat16 as a whole to write one token to it.
        dtype = "float32" if self._cpu else self._policy.compute_dtype
        depths = network.list_depths(cfg)
        self._pool = make_pool(cfg, depths, self.pages, self.page, dtype, self.drafts)
        self._order_weights()

    def _order_weights(self) -> None:
        """Take stacks apart; they themselves go, unless the caller keeps them."""
        self._weights, self._tree = jax.tree.flatten(_split_weights(self._params, self._cfg))
        del self._params

    def _list_sizes(self, least: int, most: int, factor: int = 2) -> tuple[int, ...]:
        """Sizes of programs: `least` times powers of `factor` up to `most`, of each part."""
        sizes = [least]
        while sizes[-1] < most:
            sizes.append(min(factor * sizes[-1], most))
        return tuple(self.shards * n for n in sizes)


def _fit_least(rows: int, shards: int) -> tuple[int, int]:
    """Return the fewest and the most rows of a program, on each of some devices."""
    most = -(-rows // shards)
    return min(16, most), most


_split_weights = jax.jit(network.split_weights, static_argnums=1)


def _describe(a: Any) -> jax.ShapeDtypeStruct:
    layout = getattr(a, "sharding", None)  # NumPy's arrays have none
    placed = layout if isinstance(layout, jax.NamedSharding) else None
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed)


@functools.lru_cache(maxsize=64)
def _compile(
    net: Network,
    layout: jax.tree_util.PyTreeDef,
    described: tuple[jax.ShapeDtypeStruct, ...],
    mesh: jax.sharding.Mesh | None,
    guesses: bool,
) -> jax.stages.Compiled:
    """Compile one program; runners of like sizes share it."""

    def run(weights: list[jax.Array], pool: Pool, chunks: Chunks) -> Any:
        split = jax.tree.unflatten(net.tree, weights)
        compute = network.guess if guesses else network.forward
        return compute(split, pool, chunks, net.cfg, net.policy, net.head_rows, net.experts)

    arrays = jax.tree.unflatten(layout, described)
    lowered = jax.jit(run, donate_argnums=1).lower(*arrays)
    return lowered.compile(cpu_flags() if net.row_exact else None)


def _put_in_order(
    logits: list[jax.Array], calls: Mapping[int, Mapping[int, tuple[int, Chunk]]]
) -> jax.Array:
    """Join the logits of several calls in the order of their chunks."""
    rows: dict[int, range] = {}
    first = 0
    for call, y_NX in enumerate(logits):
        at = first
        for i, (_, chunk) in calls[call].items():
            rows[i] = range(at, at + _count_wanted(chunk))
            at = rows[i].stop
        first += len(y_NX)
    order = [row for i in sorted(rows) for row in rows[i]]
    return _join(logits, np.pad(np.array(order, np.int32), (0, first - len(order))))


@jax.jit
def _join(logits: list[jax.Array], order: jax.Array) -> jax.Array:
    return jnp.concatenate([reshard(y_NX, None, None) for y_NX in logits])[order]


def _count_wanted(chunk: Chunk) -> int:
    return {"none": 0, "last": 1, "all": len(chunk.tokens)}[chunk.want]


def _list_wanted(slots: Mapping[int, Chunk], tokens: int) -> list[int]:
    """Numbers of the tokens of which logits are wanted."""
    wanted: list[int] = []
    for slot, chunk in slots.items():
        last = slot * tokens + len(chunk.tokens)
        wanted += {"none": [], "last": [last - 1], "all": range(slot * tokens, last)}[chunk.want]
    return wanted
