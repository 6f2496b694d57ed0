"""Scores of given tokens are those of the full forward pass, however they are computed."""

import jax
import numpy as np
import pytest
from test_generate import CFG, drawn

from k2jax import sharding
from k2jax.config import ConfigError, MeshConfig
from k2jax.inference.score import score
from k2jax.model import Model, forward


@pytest.fixture(scope="module")
def model() -> Model:
    return drawn()


def rows_of(seed: int, count: int):
    draw = np.random.default_rng(seed)
    context = draw.integers(0, CFG.vocab, 37).tolist()
    return [(context, draw.integers(0, CFG.vocab, 1 + i).tolist()) for i in range(count)]


def test_scores_are_those_of_the_full_forward(model):
    rows = [*rows_of(0, 4), ([3], [4, 5]), *rows_of(1, 2), ([7, 8], [])]
    token_BT = np.zeros((len(rows), 48), np.int32)
    for row, (context, rest) in zip(token_BT, rows, strict=True):
        row[: len(context) + len(rest)] = [*context, *rest]
    y_BTX = np.asarray(jax.nn.log_softmax(forward(model, token_BT)))
    likeliest = y_BTX.argmax(axis=-1)
    greedy_row = (rows[0][0], [int(likeliest[0, 36])])
    scores = score(model, [*rows, greedy_row])
    assert scores[-1].is_greedy and not scores[0].is_greedy
    for y_TX, (context, rest), found in zip(y_BTX, rows, scores, strict=False):
        places = np.arange(len(context), len(context) + len(rest))
        expected = y_TX[places - 1, rest]
        assert found.logprob == pytest.approx(expected.sum(), abs=1e-4)
        np.testing.assert_allclose([e.logprob for e in found.tokens], expected, atol=1e-5)
        assert [e.top[0][0] for e in found.tokens] == y_TX[places - 1].argmax(axis=-1).tolist()


def test_a_score_does_not_depend_on_what_is_scored_beside_it(model):
    rows = rows_of(2, 4)
    assert score(model, rows)[2] == score(model, rows[2:3])[0]


def test_mistakes_get_one_line(model):
    assert score(model, []) == []
    with pytest.raises(ConfigError, match="row 1 has no context"):
        score(model, [([1], [2]), ([], [2])])
    with pytest.raises(ConfigError, match="the context is 80"):
        score(model, [([1] * 81, [2])])


def test_the_last_token_may_follow_the_whole_context(model):
    ids = np.random.default_rng(5).integers(0, CFG.vocab, CFG.context + 1).tolist()
    y_TX = np.asarray(jax.nn.log_softmax(forward(model, np.array([ids[:-1]]))))[0]
    expected = y_TX[np.arange(CFG.context), ids[1:]]
    (found,) = score(model, [(ids[:1], ids[1:])])
    np.testing.assert_allclose([entry.logprob for entry in found.tokens], expected, atol=1e-5)


def test_scores_on_replicas_are_the_same_bits(model):
    rows = [*rows_of(6, 4), ([3, 4], [5] * 40)]
    alone = score(model, rows)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(replica=4, expert=2))):
        assert score(drawn(), rows) == alone
