import gzip
import json
import lzma
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from k2jax.config import ConfigError
from k2jax.data import Batches, compressors, eval_batches, open_data
from k2jax.data import dataset as load
from k2jax.data.sources import find
from k2jax.text.train_bpe import train_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "d.jsonl"
    modules = sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))
    lines = [line for module in modules for line in module.read_text().split("\n\n")]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def test_training_and_heldout_text_are_the_source_once(corpus, cache):
    data = open_data(str(corpus), vocab=700, cache=cache)
    wanted = {d.name: d.text for d in find(str(corpus)).documents()}
    heldout = [wanted.pop(name) for name in data.heldout_names]
    assert data.heldout_texts() == heldout and heldout
    assert list(data.train.texts(data.tokenizer)) == list(wanted.values())
    assert data.heldout_bytes == len("".join(heldout).encode())
    assert data.tokenizer.vocab == 700 and data.train.tokens.max() < 700


def test_the_second_time_nothing_is_built(corpus, cache, monkeypatch):
    lines = []
    first = open_data(str(corpus), vocab=600, cache=cache, progress=lines.append)
    assert lines == ["training a tokenizer of 600 tokens", f"tokenising {corpus}"]
    monkeypatch.setattr(load, "_build", None)
    second = open_data(str(corpus), vocab=600, cache=cache, progress=lines.append)
    assert len(lines) == 2
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert second.heldout_names == first.heldout_names
    assert second.tokenizer.digest() == first.tokenizer.digest()


def test_other_text_or_tokenizer_is_built_anew(corpus, cache, tmp_path):
    copy = tmp_path / "d.jsonl"
    copy.write_bytes(corpus.read_bytes())
    open_data(str(copy), vocab=600, cache=cache)
    open_data(str(copy), vocab=601, cache=cache)
    copy.write_text(copy.read_text() + '{"text": "more"}\n')
    open_data(str(copy), vocab=600, cache=cache)
    train_tokenizer(["hello hello"], 600, tmp_path / "own" / "tiktoken.model")
    given = open_data(str(copy), str(tmp_path / "own"), vocab=600, cache=cache)
    assert given.tokenizer.encode("hello") and len(list(cache.iterdir())) == 4


def test_a_damaged_cache_is_built_again(corpus, cache):
    open_data(str(corpus), vocab=600, cache=cache)
    (folder,) = cache.iterdir()
    (folder / "tiktoken.model").write_text("")
    data = open_data(str(corpus), vocab=600, cache=cache)
    assert data.tokenizer.vocab == 600 and list(cache.iterdir()) == [folder]


def test_a_tokenizer_larger_than_the_model_is_refused(corpus, cache, tmp_path):
    own = train_tokenizer(["some text, some text"], 600, tmp_path / "tiktoken.model")
    with pytest.raises(
        ConfigError, match=f"has {own.vocab} tokens and the model's vocab is 512; set model.vocab"
    ):
        open_data(str(corpus), str(tmp_path), vocab=512, cache=cache)
    with pytest.raises(ConfigError, match="no tokenizer at"):
        open_data(str(corpus), str(tmp_path / "none"), vocab=512, cache=cache)


def test_the_tokenizer_sees_no_heldout_text(corpus, cache, monkeypatch):
    seen = []

    def spy(texts, vocab, path):
        texts = list(texts)
        seen.extend(texts)
        return train_tokenizer(texts, vocab, path)

    monkeypatch.setattr(load, "train_tokenizer", spy)
    data = open_data(str(corpus), vocab=600, cache=cache)
    assert seen and not set(seen) & set(data.heldout_texts())
    seen.clear()
    monkeypatch.setattr(load, "TRAIN_CHARACTERS", data.train.bytes // 3)
    open_data(str(corpus), vocab=600, cache=cache / "again")
    assert 0.15 < len(seen) / data.train.documents < 0.4


def test_batches_and_scoring_work_on_opened_data(corpus, cache):
    data = open_data(str(corpus), vocab=700, cache=cache)
    batch = Batches(data.train, rows=4, context=32, seed=0).batch(0)
    assert batch["tokens"].shape == (4, 32) and batch["weights"].sum() > 100
    lengths = data.tokenizer.byte_lengths()
    scored = sum(
        (lengths[b["targets"]] * b["weights"]).sum() for b in eval_batches(data.heldout, 4, 32)
    )
    assert scored == data.heldout_bytes


def test_compressors_count_bits_of_the_concatenation():
    texts = ["some text\n" * 50, "\u00e9" * 10]
    content = "".join(texts).encode()
    got = compressors(texts)
    assert got["gzip"] == 8 * len(gzip.compress(content, 9)) / len(content)
    assert got["xz"] == 8 * len(lzma.compress(content, preset=9)) / len(content)
    with pytest.raises(ValueError, match="no text"):
        compressors([])
