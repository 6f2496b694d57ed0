"""What gives weights their meaning is the same at every start of a run, or the start is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from small_runs import changed

from k2jax.config import ConfigError
from k2jax.data import open_data
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.text.train_bpe import train_tokenizer
from k2jax.training import identity
from k2jax.training.loop import train


@pytest.fixture
def text(run, tmp_path) -> Path:
    """A copy of the run's documents, to change."""
    return Path(shutil.copytree(run.data.path, tmp_path / "text"))


def read(path, tokenizer=""):
    return open_data(str(path), tokenizer, 576)


@pytest.fixture
def begun(text, tmp_path) -> Path:
    """A folder of a run on it, as far as its identity goes."""
    out = tmp_path / "out"
    out.mkdir()
    identity.record(read(text), out, "", trained=True)
    return out


def rewrite(text: Path) -> None:
    """Change a document and leave its size."""
    file = sorted(text.iterdir())[3]
    file.write_text(file.read_text().replace("return x", "retvrn y"))


CHANGES = {
    "added": lambda text: (text / "new.py").write_text("Äpfel und Öl\n" * 99),
    "removed": lambda text: sorted(text.iterdir())[0].unlink(),
    "rewritten": rewrite,
    "cut": lambda text: sorted(text.iterdir())[0].write_text("x = 1\n"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_changed_since_a_run_began_is_refused_in_one_line(change, text, begun):
    before = (begun / "tiktoken.model").read_bytes()
    identity.require_same_data(read(text), begun)
    CHANGES[change](text)
    with pytest.raises(ConfigError, match=r"holds a run on other data.*--init") as error:
        identity.require_same_data(read(text), begun)
    assert "\n" not in str(error.value)
    assert (begun / "tiktoken.model").read_bytes() == before


def test_data_that_was_moved_or_touched_is_the_same(text, begun, tmp_path):
    for file in text.iterdir():
        file.touch()
    identity.require_same_data(read(text), begun)
    moved = text.rename(tmp_path / "elsewhere")
    identity.require_same_data(read(moved), begun)


def test_a_named_tokenizer_with_another_content_is_refused(text, tmp_path):
    named, out = tmp_path / "named", tmp_path / "out"
    named.mkdir()
    out.mkdir()
    train_tokenizer(["one text " * 50], 520, named / "tiktoken.model")
    identity.record(read(text, str(named)), out, "", trained=False)
    train_tokenizer(["another one " * 50], 520, named / "tiktoken.model")
    with pytest.raises(ConfigError, match="holds a run with another tokenizer"):
        identity.require_same_data(read(text, str(named)), out)


def test_a_run_of_an_older_version_is_compared_by_its_tokenizer(text, begun):
    (begun / "data.json").unlink()
    identity.require_same_data(read(text), begun)
    for file in text.iterdir():
        file.write_text("Ganz andere Worte, und mehr davon.\n" * 40)
    with pytest.raises(ConfigError, match="another tokenizer"):
        identity.require_same_data(read(text), begun)
    before = (begun / "tiktoken.model").read_bytes()
    identity.complete(read(text), begun)
    assert (begun / "tiktoken.model").read_bytes() == before


def test_a_damaged_record_is_named(begun):
    (begun / "data.json").write_text("{")
    with pytest.raises(ConfigError, match=r"data\.json is damaged"):
        identity.Identity.read(begun)


def test_a_run_from_weights_takes_their_tokenizer_and_keeps_it(run, whole, text, tmp_path):
    """The data is another one; template and names of special tokens come along."""
    source = Path(shutil.copytree(whole[0], tmp_path / "source"))
    (source / "chat_template.jinja").write_text("{{ messages }}{{ tools }}")
    (source / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {}}))
    CHANGES["added"](text)
    other = changed(run, "data", path=str(text))
    other = dataclasses.replace(other, train=dataclasses.replace(other.train, steps=1))
    out, own = tmp_path / "tuned", Tokenizer.load(source).digest()
    train(other, out, init=str(source), say=lambda line: None)
    assert Tokenizer.load(out).digest() == own
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}{{ tools }}"
    more = dataclasses.replace(other, train=dataclasses.replace(other.train, steps=2))
    train(more, out, say=lambda line: None)  # without --init it is its own
    assert Tokenizer.load(out).digest() == own
    CHANGES["removed"](text)
    last = dataclasses.replace(other, train=dataclasses.replace(other.train, steps=3))
    with pytest.raises(ConfigError, match="holds a run on other data"):
        train(last, out, say=lambda line: None)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_named_tokenizer_wins(run, whole, resumed):
    asked = changed(run, "data", tokenizer="here")
    assert identity.choose_tokenizer(asked, whole[0], str(whole[0]), resumed, print) == "here"


def test_weights_whose_tokenizer_training_cannot_use_are_refused(run, whole, tmp_path):
    source = Path(shutil.copytree(whole[0], tmp_path / "source"))
    (source / "tiktoken.model").unlink()
    lines: list[str] = []
    assert identity.choose_tokenizer(run, tmp_path, str(source), False, lines.append) == ""
    assert lines and "no tokenizer beside" in lines[0]
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"set --data\.tokenizer"):
        identity.choose_tokenizer(run, tmp_path, str(source), False, print)
