import dataclasses

import numpy as np
import pytest

from k2jax.data.batches import eval_batches
from k2jax.data.rows import NAMES, Rows, make_rows, plan_windows, row_count

SIZES = (5, 0, 1, 30, 2, 17, 64, 3)


def all_rows(store, context):
    return make_rows(store, np.arange(row_count(store, context)), context)


def stitched(batches):
    batches = list(batches)
    return {name: np.concatenate([b[name] for b in batches]) for name in NAMES}


def literal_rows(store, context):
    """The definition in `rows.py`, one token at a time."""
    total, place = len(store.tokens), {}
    owner = [np.searchsorted(store.offsets, i, "right") - 1 for i in range(total)]
    rows = row_count(store, context)
    out = {name: np.zeros((rows, context), int) for name in NAMES}
    for row in range(rows):
        for i in range(context):
            at = row * context + i
            if at >= total:
                continue
            fresh = i == 0 or owner[at] != owner[at - 1]
            place["segment"] = 1 if i == 0 else place["segment"] + (owner[at] != owner[at - 1])
            place["position"] = 0 if fresh else place["position"] + 1
            has = at + 1 < total and owner[at + 1] == owner[at]
            out["tokens"][row, i] = store.tokens[at]
            out["targets"][row, i] = store.tokens[at + 1] if has else 0
            out["segments"][row, i] = place["segment"]
            out["positions"][row, i] = place["position"]
            out["weights"][row, i] = has
    return out


@pytest.mark.parametrize("context", [1, 4, 16, 37, 500])
def test_rows_are_what_their_definition_says(make_store, context):
    store = make_store(*SIZES)
    got, wanted = all_rows(store, context), literal_rows(store, context)
    for name in NAMES:
        np.testing.assert_array_equal(got[name], wanted[name], name)
        assert got[name].dtype == (np.float32 if name == "weights" else np.int32)


@pytest.mark.parametrize("context", [4, 16, 37])
def test_no_target_comes_from_another_document(make_store, byte_tokenizer, context):
    got = all_rows(make_store(*SIZES), context)
    scored = got["weights"] == 1
    assert not (got["targets"][scored] == byte_tokenizer.bos).any()
    assert not scored[got["tokens"] == byte_tokenizer.eos].any()
    assert not scored[got["segments"] == 0].any()


def test_every_token_is_a_target_once(make_store, byte_tokenizer):
    store = make_store(*SIZES)
    got = all_rows(store, 16)
    targets = got["targets"][got["weights"] == 1].tolist()
    assert targets == [t for t in store.tokens.tolist() if t != byte_tokenizer.bos]


def test_a_row_outside_the_store_is_padding(make_store):
    store = make_store(*SIZES)
    for row in (-1, row_count(store, 16), row_count(store, 16) + 7):
        got = make_rows(store, np.array([row]), 16)
        assert not any(array.any() for array in got.values())


@pytest.mark.parametrize("stride", [0, 1, 5, 8, 16])
@pytest.mark.parametrize("rows", [1, 3])
def test_every_heldout_byte_is_scored_exactly_once(make_store, byte_tokenizer, rows, stride):
    store = make_store(*SIZES)
    batches = list(eval_batches(store, rows, 16, stride=stride))
    assert all(batch["tokens"].shape == (rows, 16) for batch in batches)
    got = stitched(batches)
    targets = got["targets"][got["weights"] == 1]
    assert targets.tolist() == [t for t in store.tokens.tolist() if t != byte_tokenizer.bos]
    assert byte_tokenizer.byte_lengths()[targets].sum() == store.bytes == sum(SIZES)


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_a_scored_token_sees_context_less_stride_tokens_or_all_there_are(make_store, stride):
    store, context = make_store(*SIZES), 16
    windows = plan_windows(store, context, stride)
    for w in range(len(windows.begin)):
        begin, length = windows.begin[w], windows.length[w]
        document = store.offsets[np.searchsorted(store.offsets, begin, "right") - 1]
        first = begin + length - windows.fresh[w]  # input from which the first target is scored
        assert first - begin + 1 >= min(context - stride + 1, first - document + 1)
        assert length <= context


def test_windows_of_a_row_are_segments_that_stay_apart(make_store):
    got = stitched(eval_batches(make_store(*SIZES), 2, 16, stride=8))
    for row in range(len(got["tokens"])):
        segments, positions = got["segments"][row], got["positions"][row]
        used = segments > 0
        steps = np.diff(segments[used])
        assert set(steps) <= {0, 1} and not used[used.sum() :].any()
        restarts = np.flatnonzero(steps) + 1
        assert not positions[used][restarts].any() and positions[0] == 0
        assert (np.diff(positions[used])[steps == 0] == 1).all()
        same = np.flatnonzero(steps == 0)
        np.testing.assert_array_equal(got["targets"][row][same], got["tokens"][row][same + 1])


def test_a_limit_takes_rows_spread_over_all(make_store):
    store = make_store(*SIZES)
    whole = stitched(eval_batches(store, 1, 16))["tokens"]
    some = stitched(eval_batches(store, 2, 16, limit=4))["tokens"]
    picked = [int(np.flatnonzero((whole == row).all(axis=1))[0]) for row in some]
    assert picked == [i * len(whole) // 4 for i in range(4)]
    beyond = stitched(eval_batches(store, 1, 16, limit=10_000))["tokens"]
    np.testing.assert_array_equal(beyond, whole)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_score_the_same_batches_together(make_store, hosts):
    store = make_store(*SIZES)
    whole = stitched(eval_batches(store, 4, 16))
    parts = [list(eval_batches(store, 4, 16, parts=[h], of=hosts)) for h in range(hosts)]
    together = stitched([batch for step in zip(*parts, strict=True) for batch in step])
    for name in NAMES:
        np.testing.assert_array_equal(whole[name], together[name])


def test_a_stride_beyond_the_context_is_refused(make_store):
    with pytest.raises(ValueError, match=r"stride is 17; it must be in 1\.\.16"):
        next(eval_batches(make_store(3), 1, 16, stride=17))


def test_whole_documents_share_a_row_and_are_cut_only_where_they_must(make_store):
    """Next fit, as its definition says; a document of n tokens takes n - 1 places."""
    store = dataclasses.replace(make_store(5, 0, 1, 30, 2, 17, 3), whole=True)
    context = 16
    rows = Rows(store, context)
    got = rows.make(np.arange(rows.count))
    wanted, used = [[]], 0
    for d in range(store.documents):
        ids = store.document(d).tolist()
        for start in range(0, len(ids) - 1, context):
            piece = ids[start : start + context + 1]
            if used + len(piece) - 1 > context:
                wanted.append([])
                used = 0
            wanted[-1].append(piece)
            used += len(piece) - 1
    assert rows.count == len(wanted)
    for row, pieces in enumerate(wanted):
        inputs = [i for piece in pieces for i in piece[:-1]]
        targets = [i for piece in pieces for i in piece[1:]]
        numbers = [n for n, piece in enumerate(pieces, 1) for _ in piece[1:]]
        for name, values in (("tokens", inputs), ("targets", targets), ("segments", numbers)):
            assert got[name][row].tolist() == values + [0] * (context - len(values))
        assert got["weights"][row].sum() == len(targets)


def test_what_is_not_learned_has_no_weight_in_whole_documents_either(make_store):
    store = make_store(5, 12, 40)
    mask = np.random.default_rng(0).random(store.size) < 0.5
    whole = Rows(dataclasses.replace(store, unscored=mask, whole=True), 16)
    got = whole.make(np.arange(whole.count))
    learned = got["targets"][got["weights"] == 1].tolist()
    begins = np.isin(np.arange(store.size), store.offsets)
    assert learned == store.tokens[~mask & ~begins].tolist()
