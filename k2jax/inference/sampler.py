"""The next token of each row, from its logits.

Everything of a row depends on that row alone, bit for bit and in any number of rows: sums are taken
in a fixed tree, the random number is keyed by the request's seed and the number of the new token,
and no token's probability is compared with another row's.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from k2jax.inference.request import COLD, SEEDS, TOP_LOGPROBS, Sampling
from k2jax.sharding import reshard

NOT_FINITE = -1  # in place of a token: the row's logits are not numbers
NOTHING_ALLOWED = -2  # in place of a token: its constraint allows none


class Knobs(NamedTuple):
    """Settings of each row, [batch]; see `Sampling`."""

    temperature_B: np.ndarray  # float32; 0: greedy
    top_p_B: np.ndarray  # float32
    top_k_B: np.ndarray  # int32; 0: all
    min_p_B: np.ndarray  # float32
    seed_B: np.ndarray  # uint32
    number_B: np.ndarray  # int32, of the new token


@functools.partial(jax.jit, static_argnames="allowed")
def pick_likeliest(y_BX: jax.Array, *, allowed: int) -> jax.Array:
    """Return the most likely token of each row, int32 [batch], or NOT_FINITE.

    Args:
        y_BX: logits, float32.
        allowed: ids below it may be chosen.
    """
    y_BX = _gather_rows(y_BX)
    return _mark(_argmax(_cut(y_BX, allowed)), y_BX)


@functools.partial(jax.jit, static_argnames="allowed")
def draw(y_BX: jax.Array, knobs: Knobs, *, allowed: int) -> jax.Array:
    """Draw a token for each row, int32 [batch], or NOT_FINITE; greedy rows get the likeliest.

    Args:
        y_BX: logits, float32, adjusted.
        knobs: of each row.
        allowed: ids below it may be chosen.
    """
    whole_BX = _gather_rows(y_BX)
    y_BX = _cut(whole_BX, allowed)
    greedy_B = knobs.temperature_B < COLD
    z_BX = (y_BX - _finite(y_BX.max(axis=1, keepdims=True))) / jnp.where(
        greedy_B, 1, knobs.temperature_B
    )[:, None]
    kept_BX = z_BX >= jnp.log(knobs.min_p_B)[:, None]
    filtered = ((knobs.top_k_B > 0) | (knobs.top_p_B < 1)).any()
    kept_BX &= jax.lax.cond(filtered, _filter, _keep_all, z_BX, knobs)
    token_B = _draw_by_weight(jnp.where(kept_BX, jnp.exp(z_BX), 0), _uniform(knobs))
    return _mark(jnp.where(greedy_B, _argmax(y_BX), token_B), whole_BX)


@jax.jit
def adjust(
    y_BX: jax.Array, added_BX: jax.Array, repetition_B: jax.Array, seen_BW: jax.Array
) -> jax.Array:
    """Apply the repetition penalty to tokens that were seen, then add.

    Args:
        y_BX: logits, float32.
        added_BX: float32: bias, presence and frequency penalties.
        repetition_B: float32, 1: none.
        seen_BW: bits of tokens, uint32 [batch, ceil(vocab / 32)].
    """
    y_BX, penalty_B1 = _gather_rows(y_BX), jnp.asarray(repetition_B)[:, None]
    penalised_BX = jnp.where(y_BX > 0, y_BX / penalty_B1, y_BX * penalty_B1)
    return jnp.where(_unpack(seen_BW, y_BX.shape[1]), penalised_BX, y_BX) + added_BX


@jax.jit
def forbid(y_BX: jax.Array, mask_BW: jax.Array) -> jax.Array:
    """Leave the logits of tokens whose bit is set; rows that are not finite stay so."""
    y_BX = _gather_rows(y_BX)
    kept_BX = _unpack(mask_BW, y_BX.shape[1]) | ~_are_numbers(y_BX)[:, None]
    return jnp.where(kept_BX, y_BX, -jnp.inf)


@jax.jit
def take_rows(y_BX: jax.Array, row_B: jax.Array) -> jax.Array:
    """Return some rows of the logits; any row for numbers beyond the last."""
    return _gather_rows(y_BX).at[row_B].get(mode="clip")


@functools.partial(jax.jit, static_argnames="size")
def put_rows(token_B: jax.Array, row_B: jax.Array, *, size: int) -> jax.Array:
    """Return tokens at their rows among `size`, -1 elsewhere; rows beyond the last are dropped."""
    return jnp.full(size, -1, jnp.int32).at[row_B].set(token_B, mode="drop")


@functools.partial(jax.jit, static_argnames="top")
def log_probabilities(
    y_BX: jax.Array, known_B: jax.Array, chosen_B: jax.Array, *, top: int
) -> jax.Array:
    """Log-probabilities of a token and of the likeliest ones, float32 [batch, 1 + 2 top].

    Columns: the token's; of the `top` likeliest, likeliest first; their ids, exact below 2^24.

    Args:
        y_BX: logits, float32.
        known_B: int32, the token of each row; below 0: it is the one in `chosen_B`.
        chosen_B: int32.
        top: how many.
    """
    y_BX = _gather_rows(y_BX)
    token_B = jnp.where(known_B < 0, chosen_B, known_B)
    most_B1 = y_BX.max(axis=1, keepdims=True)
    total_B1 = jnp.log(_sum_by_tree(jnp.exp(y_BX - most_B1))[-1])
    own_B1 = jnp.take_along_axis(y_BX, jnp.maximum(token_B, 0)[:, None], axis=1)
    if top == 1:
        best_BK, id_BK = most_B1, _argmax(y_BX)[:, None]
    else:
        best_BK, id_BK = jax.lax.top_k(y_BX, min(top, y_BX.shape[1]))
    values_BK = jnp.concatenate([own_B1, best_BK], axis=1) - most_B1 - total_B1
    return jnp.concatenate([values_BK, id_BK.astype(jnp.float32)], axis=1)


def _gather_rows(y_BX: jax.Array) -> jax.Array:
    return reshard(y_BX, None, None)


def _cut(y_BX: jax.Array, allowed: int) -> jax.Array:
    return jnp.where(jnp.arange(y_BX.shape[1]) < allowed, y_BX, -jnp.inf)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _argmax(y_BX: jax.Array) -> jax.Array:
    # Two plain reductions: on a CPU ten times as fast as the one that carries an index.
    place_X = jnp.arange(y_BX.shape[1], dtype=jnp.int32)
    most_B1 = y_BX.max(axis=1, keepdims=True)
    return jnp.where(y_BX == most_B1, place_X, y_BX.shape[1]).min(axis=1)


def _mark(token_B: jax.Array, y_BX: jax.Array) -> jax.Array:
    """Put in place of tokens why there is none."""
    token_B = jnp.where(y_BX.max(axis=1) == -jnp.inf, NOTHING_ALLOWED, token_B)
    return jnp.where(_are_numbers(y_BX), token_B, NOT_FINITE).astype(jnp.int32)


def _are_numbers(y_BX: jax.Array) -> jax.Array:
    # Not by the largest: XLA may lose a NaN in a maximum.
    return (y_BX < jnp.inf).all(axis=1)


def _unpack(bits_BW: jax.Array, size: int) -> jax.Array:
    """Bits as bool [batch, size]."""
    bit_BW32 = bits_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)
    return (bit_BW32 & 1).astype(bool).reshape(bits_BW.shape[0], -1)[:, :size]


def _uniform(knobs: Knobs) -> jax.Array:
    """One number in [0, 1) a row."""

    def uniform(seed: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), number))

    return jax.vmap(uniform)(jnp.asarray(knobs.seed_B), jnp.asarray(knobs.number_B))


def _sum_by_tree(p_BX: jax.Array) -> list[jax.Array]:
    """Sums of 1, 2, 4, ... neighbours, down to one column; the order of additions is fixed."""
    size = p_BX.shape[1]
    level_BX = jnp.pad(p_BX, ((0, 0), (0, (1 << (size - 1).bit_length()) - size)))
    levels = [level_BX]
    while level_BX.shape[1] > 1:
        # Halves, not neighbours, are added: whole vectors. Column i of a level has i + k * width.
        half = level_BX.shape[1] // 2
        level_BX = level_BX[:, :half] + level_BX[:, half:]
        levels.append(level_BX)
    return levels


def _draw_by_weight(p_BX: jax.Array, u_B: jax.Array) -> jax.Array:
    """Return a column of each row with probability by its weight, descending the tree of sums."""
    *levels, total_B1 = _sum_by_tree(p_BX)
    place_B1 = jnp.zeros_like(total_B1, dtype=jnp.int32)
    left_B1 = u_B[:, None] * total_B1
    for level_BX in reversed(levels):
        half = level_BX.shape[1] // 2
        low_B1 = jnp.take_along_axis(level_BX, place_B1, axis=1)
        high_B1 = jnp.take_along_axis(level_BX, place_B1 + half, axis=1)
        # Rounding may leave more than there is above: never go where nothing is.
        is_high_B1 = (left_B1 >= low_B1) & (high_B1 > 0)
        place_B1 += jnp.where(is_high_B1, half, 0)
        left_B1 -= jnp.where(is_high_B1, low_B1, 0)
    return place_B1[:, 0]


def _keep_all(z_BX: jax.Array, knobs: Knobs) -> jax.Array:
    return jnp.ones(z_BX.shape, bool)


def _filter(z_BX: jax.Array, knobs: Knobs) -> jax.Array:
    """Which tokens `top_k`, then `top_p` keep; ties with the last one kept stay too."""
    rows = z_BX, knobs.top_k_B, knobs.top_p_B
    # On a CPU a row fits the cache, a batch does not, and rows without a limit are skipped.
    if jax.default_backend() == "cpu":
        return jax.lax.map(_filter_row, rows)
    return jax.vmap(lambda *row: _filter_row(row))(*rows)


def _filter_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    z_X, k, top_p = row
    # Floats as integers of the same order: halving their range ends at the exact threshold.
    bits_X = jax.lax.bitcast_convert_type(z_X, jnp.uint32)
    order_X = jnp.where(bits_X >> 31 == 1, ~bits_X, bits_X | jnp.uint32(1 << 31))

    def limit(weight_X: jax.Array, enough: jax.Array) -> jax.Array:
        """Return the highest threshold that tokens of so much weight reach."""

        def halve(i: jax.Array, least: jax.Array) -> jax.Array:
            higher = least | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
            reached = jnp.where(order_X >= higher, weight_X, 0).sum() >= enough
            return jnp.where(reached, higher, least)

        return jax.lax.fori_loop(0, 32, halve, jnp.uint32(0))

    def none(*_: jax.Array) -> jax.Array:
        return jnp.uint32(0)

    least = jax.lax.cond(k > 0, limit, none, jnp.ones_like(z_X), k.astype(jnp.float32))
    p_X = jnp.where(order_X >= least, jnp.exp(z_X), 0)
    enough = top_p * p_X.sum()
    return order_X >= jnp.maximum(least, jax.lax.cond(top_p < 1, limit, none, p_X, enough))


class Sampler:
    """The settings of each row of the engine, as arrays, and what its tokens have changed."""

    def __init__(self, rows: int, vocab: int, allowed: int, picked: int):
        """No row has begun.

        Args:
            rows: most sequences.
            vocab: logits of a row.
            allowed: ids below it may be chosen.
            picked: most tokens that are chosen at once.
        """
        self._vocab, self._allowed, self._words = vocab, allowed, -(-vocab // 32)
        self._picked = picked
        self._knobs = Knobs(
            np.zeros(rows, np.float32),
            np.ones(rows, np.float32),
            np.zeros(rows, np.int32),
            np.zeros(rows, np.float32),
            np.zeros(rows, np.uint32),
            np.zeros(rows, np.int32),
        )
        self._adjusted: dict[int, _Adjustment] = {}
        self._drawn: set[int] = set()  # rows that are not greedy

    def begin(
        self, row: int, sampling: Sampling, prompt: Sequence[int], new: Sequence[int]
    ) -> None:
        """Set a row up for a sequence that has `new` tokens already."""
        temperature = 0.0 if sampling.is_greedy else sampling.temperature
        values = temperature, sampling.top_p, sampling.top_k, sampling.min_p
        for array, value in zip(
            self._knobs, (*values, sampling.seed % SEEDS, len(new)), strict=True
        ):
            array[row] = value
        self._drawn.discard(row)
        if not sampling.is_greedy:
            self._drawn.add(row)
        self._adjusted.pop(row, None)
        if sampling.adjusts:
            self._adjusted[row] = _Adjustment(sampling, prompt, self._vocab)
            for token in new:
                self._adjusted[row].count(token)

    def accept(self, row: int, token: int) -> None:
        """Note the token that a row was given."""
        self._knobs.number_B[row] += 1
        if row in self._adjusted:
            self._adjusted[row].count(token)

    def pick(
        self,
        y_BX: jax.Array,
        rows: Sequence[int],
        masks: Mapping[int, np.ndarray],
        ahead: Sequence[int] = (),
    ) -> jax.Array:
        """Choose the next token of each row: int32 [batch], on the device.

        Args:
            y_BX: logits, float32; of `rows`, in their order, then of nobody.
            rows: of the engine.
            masks: allowed tokens, by row of the engine; see `Constraint.mask`.
            ahead: for each of `rows`, new tokens that it gets before this one; (): none.
        """
        size = y_BX.shape[0]
        if self._adjusted and any(row in self._adjusted for row in rows):
            y_BX = adjust(y_BX, *self._adjustments(rows, size))
        if masks:
            y_BX = forbid(y_BX, self._mask_array(rows, masks, size))
        if self._drawn and any(row in self._drawn for row in rows):
            at = np.zeros(size, np.int32)
            at[: len(rows)] = rows
            knobs = Knobs(*(array[at] for array in self._knobs))
            knobs.number_B[: len(ahead)] += np.asarray(ahead, np.int32)
            return draw(y_BX, knobs, allowed=self._allowed)
        return pick_likeliest(y_BX, allowed=self._allowed)

    def _adjustments(self, rows: Sequence[int], size: int) -> tuple[np.ndarray, ...]:
        added = np.zeros((size, self._vocab), np.float32)
        repetition = np.ones(size, np.float32)
        seen = np.zeros((size, self._words), np.uint32)
        for at, row in enumerate(rows):
            if adjustment := self._adjusted.get(row):
                added[at], seen[at] = adjustment.added, adjustment.seen
                repetition[at] = adjustment.sampling.repetition_penalty
        return added, repetition, seen

    def _mask_array(
        self, rows: Sequence[int], masks: Mapping[int, np.ndarray], size: int
    ) -> np.ndarray:
        bits = np.full((size, self._words), 0xFFFFFFFF, np.uint32)
        for at, row in enumerate(rows):
            if row in masks:
                mask = masks[row][: self._words]
                bits[at, : len(mask)], bits[at, len(mask) :] = mask, 0
        return bits

    def programs(self, y_BX: jax.Array) -> list[Callable[[], jax.Array]]:
        """Everything that logits of this shape may be put through, for a warm-up."""
        size = y_BX.shape[0]
        token_B = np.zeros(size, np.int32)
        scores = [
            functools.partial(log_probabilities, y_BX, token_B, token_B, top=top)
            for top in (1, TOP_LOGPROBS)
        ]
        if size > self._picked:  # of prompts that are scored; what is chosen is taken out first
            row_B = np.zeros(self._picked, np.int32)
            taking = functools.partial(take_rows, y_BX, row_B)
            return [*scores, taking, functools.partial(put_rows, row_B, row_B, size=size)]
        knobs = Knobs(*(array[token_B] for array in self._knobs))
        return [
            lambda: pick_likeliest(y_BX, allowed=self._allowed),
            lambda: draw(y_BX, knobs, allowed=self._allowed),
            lambda: adjust(y_BX, *self._adjustments((), size)),
            lambda: forbid(y_BX, self._mask_array((), {}, size)),
            *scores,
        ]


class _Adjustment:
    """What bias and penalties do to the logits of one sequence."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab: int):
        self.sampling = sampling
        self.added = np.zeros(vocab, np.float32)
        self.seen = np.zeros(-(-vocab // 32), np.uint32)
        self._counts = np.zeros(vocab, np.int32)
        for token, bias in sampling.logit_bias.items():
            self.added[token] = bias
        for token in set(prompt) if sampling.repetition_penalty != 1 else ():
            self._see(token)

    def _see(self, token: int) -> None:
        self.seen[token >> 5] |= np.uint32(1 << (token & 31))

    def count(self, token: int) -> None:
        self._counts[token] += 1
        count, sampling = int(self._counts[token]), self.sampling
        self._see(token)
        self.added[token] = (
            sampling.logit_bias.get(token, 0.0)
            - sampling.presence_penalty
            - sampling.frequency_penalty * count
        )
