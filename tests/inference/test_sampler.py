"""Choosing a token: the distribution is right, and a row depends on nothing but itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from k2jax.inference.request import Sampling
from k2jax.inference.sampler import (
    NOT_FINITE,
    NOTHING_ALLOWED,
    Sampler,
    adjust,
    draw,
    forbid,
    log_probabilities,
    pick_likeliest,
)

VOCAB = 300


@functools.cache
def logits(rows: int = 16, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(rows, vocab)) * 3).astype(np.float32)


def sampler(settings, vocab=VOCAB, allowed=0, prompts=None, new=()) -> Sampler:
    ours = Sampler(len(settings), vocab, allowed or vocab, len(settings))
    for row, sampling in enumerate(settings):
        ours.begin(row, sampling, prompts[row] if prompts else [0], new)
    return ours


def pick(y, settings, masks=None, **kind) -> list[int]:
    ours = sampler(settings, y.shape[1], **kind)
    return np.asarray(ours.pick(jnp.asarray(y), range(len(settings)), masks or {})).tolist()


def bits(tokens, vocab=VOCAB) -> np.ndarray:
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << (token % 32))
    return words


def frequencies(y_X, sampling, draws=4_000, **kind) -> np.ndarray:
    settings = [Sampling(**{**vars(sampling), "seed": seed}) for seed in range(draws)]
    tokens = pick(np.tile(y_X, (draws, 1)), settings, **kind)
    return np.bincount(tokens, minlength=len(y_X)) / draws


P = np.array([0.1, 0.2, 0.3, 0.4], np.float32)


SAMPLED = Sampling(1.0, repetition_penalty=1.2, presence_penalty=0.5, seed=4)


@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        (Sampling(1.0), [0.1, 0.2, 0.3, 0.4]),
        (Sampling(0.5), [1, 4, 9, 16]),
        (Sampling(1.0, top_p=0.7), [0, 0, 0.3, 0.4]),
        (Sampling(1.0, top_p=0.71), [0, 0.2, 0.3, 0.4]),
        (Sampling(1.0, top_k=3), [0, 0.2, 0.3, 0.4]),
        (Sampling(1.0, top_k=3, top_p=0.5), [0, 0, 0.3, 0.4]),  # 0.7 of the three's 0.9
        (Sampling(1.0, min_p=0.6), [0, 0, 0.3, 0.4]),
        (Sampling(1.0, top_p=1e-9), [0, 0, 0, 1]),
        (Sampling(1.0, logit_bias={0: float(np.log(4))}), [0.4, 0.2, 0.3, 0.4]),
    ],
)
def test_draws_follow_the_probabilities_that_settings_leave(sampling, weights):
    expected = np.array(weights) / np.sum(weights)
    np.testing.assert_allclose(frequencies(np.log(P), sampling), expected, atol=0.03)


def test_draws_follow_a_large_vocabulary():
    y_X = logits(1, 5_000)[0]
    p_X = np.exp(np.float64(y_X) - y_X.max())
    p_X /= p_X.sum()
    found = frequencies(y_X, Sampling(1.0))
    often = p_X > 0.005
    np.testing.assert_allclose(found[often], p_X[often], atol=0.012)
    assert abs(found[~often].sum() - p_X[~often].sum()) < 0.03


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(0.8, seed=3),
        Sampling(1.0, top_p=0.9, seed=4),
        Sampling(1.0, top_k=17, min_p=0.01, seed=5),
        Sampling(0.7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.1),
        Sampling(1e-40),
    ],
)
def test_a_row_gets_the_same_token_alone_and_among_others(sampling):
    y_BX = logits(16, 16_384)
    others = [Sampling(0.1 * i, top_p=0.5 + 0.03 * i, top_k=i, seed=i) for i in range(15)]
    for place in (0, 7, 15):
        settings = [*others[:place], sampling, *others[place:]]
        rows = np.roll(y_BX, place, axis=0)  # our logits are the first row's, at `place`
        assert pick(rows, settings)[place] == pick(y_BX[:1], [sampling])[0]


def test_draws_are_keyed_by_seed_and_number():
    y_BX = np.zeros((64, VOCAB), np.float32)
    same = [Sampling(1.0, seed=9)] * 64
    assert len(set(pick(y_BX, same))) == 1
    assert len(set(pick(y_BX, [Sampling(1.0, seed=i) for i in range(64)]))) > 40
    ours = sampler(same[:1])
    tokens = []
    for _ in range(20):
        tokens.append(int(ours.pick(jnp.asarray(y_BX[:1]), [0], {})[0]))
        ours.accept(0, tokens[-1])
    assert len(set(tokens)) > 15
    assert pick(y_BX[:1], same[:1], new=tokens[:7])[0] == tokens[7]  # begun again


def test_ids_beyond_the_tokenizer_are_never_chosen():
    y_BX = logits().copy()
    y_BX[:, 200:] += 50
    assert max(pick(y_BX, [Sampling(1.0, seed=i) for i in range(16)], allowed=200)) < 200
    assert pick(y_BX, [Sampling()] * 16, allowed=200) == y_BX[:, :200].argmax(axis=1).tolist()


def test_a_mask_leaves_only_its_tokens():
    y_BX = logits()
    masks = {0: bits([5, 299]), 1: bits([]), 2: bits([64])[:3]}
    tokens = pick(y_BX, [Sampling()] * 4 + [Sampling(1.0)] * 12, masks)
    assert tokens[0] == max((5, 299), key=y_BX[0].__getitem__)
    assert tokens[1] == NOTHING_ALLOWED
    assert tokens[2] == 64
    assert tokens[3] == y_BX[3].argmax()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [{}, {"temperature": 1.0}, {"presence_penalty": 1.0}, "mask"])
def test_rows_that_are_not_finite_are_marked_and_others_are_not(poison, kind):
    y_BX = logits().copy()
    y_BX[3, 7] = poison
    masks = {row: bits(range(8)) for row in range(16)} if kind == "mask" else {}
    settings = [Sampling(**({} if kind == "mask" else kind))] * 16
    tokens = pick(y_BX, settings, masks)
    assert [row for row, token in enumerate(tokens) if token < 0] == [3]
    assert tokens[3] == NOT_FINITE


def test_penalties_are_those_of_the_formulas():
    y_BX = logits(1)
    seen, new = [3, 4, int(y_BX[0].argmax())], [8, 9, 9, 250]
    sampling = Sampling(
        repetition_penalty=1.4,
        presence_penalty=0.6,
        frequency_penalty=0.3,
        logit_bias={9: 1.5, 77: 2.0},
    )
    ours = sampler([sampling], prompts=[seen], new=new[:2])
    for token in new[2:]:
        ours.accept(0, token)
    added, repetition, bit_W = ours._adjustments([0], 1)
    expected = y_BX[0].astype(np.float64)
    for token in {*seen, *new}:
        expected[token] *= 1.4 if expected[token] < 0 else 1 / 1.4
    for token in new:
        expected[token] -= 0.3
    for token in set(new):
        expected[token] -= 0.6
    expected[9] += 1.5
    expected[77] += 2.0
    found = adjust(jnp.asarray(y_BX), added, repetition, bit_W)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


@pytest.mark.parametrize("top", [1, 20])
def test_log_probabilities_are_those_of_the_softmax(top):
    y_BX = logits()
    token_B = np.arange(16, dtype=np.int32) * 3
    found = np.asarray(log_probabilities(jnp.asarray(y_BX), token_B, token_B, top=top))
    y64 = y_BX.astype(np.float64)
    expected = y64 - np.log(np.exp(y64).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found[:, 0], expected[np.arange(16), token_B], atol=1e-5)
    best = np.argsort(-y_BX, axis=1, kind="stable")[:, :top]
    np.testing.assert_array_equal(found[:, 1 + top :], best)
    np.testing.assert_allclose(
        found[:, 1 : 1 + top], np.take_along_axis(expected, best, axis=1), atol=1e-5
    )
    alone = np.asarray(
        log_probabilities(jnp.asarray(y_BX[5:6]), token_B[5:6], token_B[5:6], top=top)
    )
    np.testing.assert_array_equal(found[5:6], alone)


def test_a_warm_up_compiles_all_that_rows_are_put_through():
    ours = sampler([Sampling(1.0, presence_penalty=1.0), Sampling()])
    y_BX = jnp.asarray(logits(2))
    jax.block_until_ready([program() for program in ours.programs(y_BX)])
    programs = adjust, draw, forbid, pick_likeliest
    before = [program._cache_size() for program in programs]
    ours.pick(y_BX, [0, 1], {1: bits([3])})
    ours.pick(y_BX, [1], {})
    assert [program._cache_size() for program in programs] == before


def test_split_logits_give_the_same_tokens(mesh):
    y_BX, settings = logits(8, 304), [Sampling(), Sampling(0.9, top_p=0.9), SAMPLED, SAMPLED] * 2
    alone = pick(y_BX, settings, {0: bits([3, 9], 304)})
    mesh(data=2, expert=2, model=2)
    laid = jax.reshard(y_BX, jax.P(("data", "expert"), "model"))
    ours = sampler(settings, 304)
    assert np.asarray(ours.pick(laid, range(8), {0: bits([3, 9], 304)})).tolist() == alone
    jax.block_until_ready([program() for program in ours.programs(laid)])
