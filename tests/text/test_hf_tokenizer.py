import json
import random

import pytest

from k2jax.config import ConfigError
from k2jax.text.hf_tokenizer import HfTokenizer
from k2jax.text.incremental_decode import TextStream
from k2jax.text.train_bpe import make_bpe

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "na\u00efve caf\u00e9 \u6f22\u5b57 \U0001f600 12345",
    "",
    "\x00 \u00a0odd",
]
# As DeepSeek-V3 has them: the role tokens are no "special" ones, and are control tokens here.
ADDED = [("<s>", True), ("</s>", True), ("<|User|>", False), ("<|Assistant|>", False)]
NAMES = [name for name, _ in ADDED]


def write(folder, **config):
    """A small byte-level `tokenizer.json` and its config; the package's own tokenizer."""
    from tokenizers import AddedToken, decoders

    bpe, trainer = make_bpe(300)
    bpe.train_from_iterator(TEXTS * 3, trainer)
    bpe.decoder = decoders.ByteLevel()
    for name, special in ADDED:
        add = bpe.add_special_tokens if special else bpe.add_tokens
        add([AddedToken(name, normalized=False)])
    bpe.save(str(folder / "tokenizer.json"))
    fields = {"bos_token": "<s>", "eos_token": {"content": "</s>"}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return bpe


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    return write(folder), HfTokenizer.load(folder)


def test_ids_and_text_are_the_packages_own(both):
    theirs, ours = both
    for text in [*TEXTS, "<s>x<|User|>y"]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == text
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert ours.vocab == theirs.get_vocab_size()


def test_text_cannot_write_control_tokens_unless_asked(both):
    _, ours = both
    text = "".join(NAMES) + "x"
    control = set(ours.specials.values())
    assert not control & set(ours.encode(text)) and ours.decode(ours.encode(text)) == text
    assert not control & set(ours.encode_batch([text])[0])
    assert ours.encode(text, special=True)[:4] == [ours.specials[name] for name in NAMES]


def test_bytes_add_up_and_stream(both):
    _, ours = both
    lengths = ours.byte_lengths()
    for text in TEXTS:
        ids = ours.encode(text)
        assert lengths[ids].sum() == len(text.encode())
        stream = TextStream(ours)
        assert "".join(stream.feed([i]) for i in ids) + stream.close() == text
    rng = random.Random(0)
    for _ in range(50):
        ids = rng.choices(range(ours.vocab), k=8)
        stream = TextStream(ours)
        assert "".join(stream.feed([i]) for i in ids) + stream.close() == ours.decode(ids)
    assert not lengths[list(ours.specials.values())].any()
    assert ours.encode("\ud800") == ours.encode("\ufffd")
    with pytest.raises(ValueError, match=r"token id 9999 is outside"):
        ours.decode([9999])


def test_ends_come_from_every_config_of_the_folder(tmp_path):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    found = HfTokenizer.load(tmp_path)
    assert (found.bos, found.eos) == (found.specials["<s>"], found.specials["</s>"])
    assert found.stops == (found.eos, 3, 7, 5)


def test_damaged_and_other_files_get_one_line(tmp_path):
    write(tmp_path)
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    config = (tmp_path / "tokenizer_config.json").read_text()
    for content, message in [
        (good | {"decoder": {"type": "Metaspace"}}, "is no byte-level tokenizer"),
        (good | {"added_tokens": []}, "no token '<s>', which is the bos_token"),
        (good | {"model": {"type": "Unheard"}}, "the tokenizers package cannot read it"),
        ([], "does not hold a JSON object"),
    ]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message) as error:
            HfTokenizer.load(tmp_path)
        assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(good))
    (tmp_path / "tokenizer_config.json").write_text(config.replace("bos_token", "other"))
    with pytest.raises(ConfigError, match=r"tokenizer_config.json names no bos_token"):
        HfTokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"no file .*tokenizer_config.json"):
        HfTokenizer.load(tmp_path)
