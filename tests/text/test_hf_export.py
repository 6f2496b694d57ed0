"""The files that other readers know give what `tiktoken.model` and K2's template give."""

import json
import os
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Foreign

from k2jax.text.hf_export import (
    CHAT_TEMPLATE,
    generation_config,
    merges,
    tokenizer_config,
    tokenizer_json,
)
from k2jax.text.hf_tokenizer import HfTokenizer
from k2jax.text.jinja_template import FolderTemplate
from k2jax.text.kimi_template import KIMI_K2, to_text
from k2jax.text.kimi_tokenizer import Tokenizer
from k2jax.text.train_bpe import train_tokenizer

PUBLISHED = os.environ.get("K2JAX_KIMI_TOKENIZER", "")  # a folder with Moonshot's tokenizer
TEXTS = [
    "",
    " ",
    "\n",
    "\r\n\r\n",
    "   def f(x):\n\treturn x ** 2  # a comment\n\n\n",
    "I'll we've DON'T it's",
    "'S '\u017f 're",
    "1 12 123 1234 12345678.90",
    "中文漢字abc日本語ひらがなカタカナ",
    "한국어 가나다",
    "naïve café e\u0301",
    "😀👩\u200d👧🏽 🇩🇪",
    "\u00a0\u3000\u2028\t\x00\x7f",
    "привет ΑΒΓδ שלום مرحبا नमस्ते",
    "HelloWorld helloWORLD XMLHttp",
    "https://example.org/a?b=c&d=%20#e",
    '{"a": [1, 2.5e-3, null]}',
    "<html>&nbsp;</html>",
]
CODE = Path(__file__).read_text().replace("[BOS]", "").replace("<|", "").replace("[EOS]", "")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    text = " ".join(TEXTS) + CODE * 2
    return train_tokenizer([text], 1_200, tmp_path_factory.mktemp("bpe") / "tiktoken.model")


def drawn(count: int) -> list[str]:
    rng = random.Random(0)
    letters = "aAzZéß019 \t\n\r'\u2019.,-_/(){}中文한ひ😀\u200d\u00a0\u0301ΩЖ"
    pieces = [*letters, *(word for text in TEXTS for word in text.split())]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(count)]


def assert_same_ids(ours: Tokenizer, texts: list[str]) -> None:
    foreign = Foreign.from_str(json.dumps(tokenizer_json(ours)))
    for text in texts:
        assert foreign.encode(text, add_special_tokens=False).ids == ours.encode(text), text
    marks = "[BOS]a b<|im_user|> x <|im_end|>[EOS]"
    assert foreign.encode(marks).ids == ours.encode(marks, special=True)
    assert foreign.decode(ours.encode(TEXTS[9])) == TEXTS[9]


def test_tokenizer_json_gives_the_same_ids(trained):
    assert_same_ids(trained, [*TEXTS, *drawn(2_000), CODE])


@pytest.mark.skipif(not PUBLISHED, reason="K2JAX_KIMI_TOKENIZER names no folder")
def test_tokenizer_json_of_the_published_tokenizer_gives_the_same_ids():
    ours = Tokenizer.load(PUBLISHED)
    files = [path.read_text() for path in Path(__file__).parents[2].glob("k2jax/o*/**/*.py")]
    assert_same_ids(ours, [*TEXTS, *drawn(5_000), *files, CODE])


def test_every_trained_token_has_the_merge_that_made_it(trained):
    pairs = merges(trained.ranks)
    assert [trained.ranks[a + b] for a, b in pairs] == list(range(256, trained.base))


def test_a_token_that_text_becomes_only_as_a_whole_has_no_merge():
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256, b"de": 257}
    assert merges(ranks) == [(b"d", b"e")]
    ours = Tokenizer(ranks)
    assert_same_ids(ours, ["abc", "abcd", "xabc", " abc", "de", "abc de"])


def test_our_own_reader_takes_the_files(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(trained)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(trained, 64)))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_config(trained)))
    read = HfTokenizer.load(tmp_path)
    assert (read.bos, read.eos, read.vocab) == (trained.bos, trained.eos, trained.vocab)
    assert read.specials == trained.specials and set(read.stops) == set(trained.stops)
    assert [read.encode(text) for text in TEXTS] == [trained.encode(text) for text in TEXTS]


CALL = {"id": "functions.f:0", "type": "function"}
CONVERSATIONS = {
    "plain": [{"role": "user", "content": " Hi\n"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "names": [{"role": "user", "name": "Ada", "content": [{"type": "text", "text": "a"}]}],
    "calls": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                CALL | {"function": {"name": "f", "arguments": '{"city": "Köln"}'}},
                CALL
                | {"id": "functions.f:1", "function": {"name": "f", "arguments": {"b": [1, "é"]}}},
            ],
        },
        {"role": "tool", "tool_call_id": "functions.f:0", "content": "7"},
        {"role": "tool", "tool_call_id": "functions.f:1", "content": "8"},
        {"role": "assistant", "content": "Mild."},
        {"role": "user", "content": "Thanks"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("tools", [[], TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_exported_template_is_k2_s(kind, tools, prompt, trained):
    template = FolderTemplate({"default": CHAT_TEMPLATE}, trained.specials, "chat_template.jinja")
    ours = KIMI_K2.parts(CONVERSATIONS[kind], tools, prompt)
    assert to_text(template.parts(CONVERSATIONS[kind], tools, prompt)) == to_text(ours)
