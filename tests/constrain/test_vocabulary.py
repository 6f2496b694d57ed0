"""Tokenizers of other formats, and sets of tokens."""

import json

import numpy as np
import pytest
from drive import BYTES, draw, tool

from k2jax.config import ConfigError
from k2jax.constrain import make_constraint
from k2jax.constrain.vocabulary import allow, forbid, list_ids, open_vocabulary
from k2jax.text.hf_tokenizer import HfTokenizer
from k2jax.text.train_bpe import make_bpe

SCHEMA = {"type": "object", "properties": {"naïve": {"type": "string"}}, "required": ["naïve"]}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A small `tokenizer.json` with a gap in its ids."""
    from tokenizers import AddedToken, decoders

    folder = tmp_path_factory.mktemp("hf")
    bpe, trainer = make_bpe(300)
    bpe.train_from_iterator(["naïve café 漢字 12345 " * 3], trainer)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(name, normalized=False) for name in ("<s>", "</s>")])
    bpe.save(str(folder / "tokenizer.json"))
    fields = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return HfTokenizer.load(folder)


def test_json_is_constrained_with_a_tokenizer_json(hf):
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    for seed in range(6):
        made = make_constraint(hf, response_format=form)
        out = draw(made, made.least + 4 * seed, np.random.default_rng(seed), hf.stops)
        assert out[-1] in hf.stops
        assert list(json.loads(hf.decode(out[:-1]))) == ["naïve"]


def test_calls_need_kimis_control_tokens(hf):
    with pytest.raises(ConfigError, match="calls need a tokenizer with"):
        make_constraint(hf, tools=[tool(SCHEMA)])


def test_masks_hold_one_bit_a_token():
    words = open_vocabulary(BYTES)
    mask = words.pack([0, 31, 32, 300])
    allow(mask, 65), forbid(mask, 31)
    assert list_ids(mask).tolist() == [0, 32, 65, 300]
    assert len(mask) == -(-BYTES.vocab // 32)
    assert open_vocabulary(BYTES) is words
