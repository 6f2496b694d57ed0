import base64
import random
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

from k2jax.config import ConfigError
from k2jax.text import kimi_tokenizer as module
from k2jax.text.kimi_tokenizer import ALTERNATIVES, MAX_RUN, PATTERN, Tokenizer, cut_pieces
from k2jax.text.train_bpe import make_bpe, train_tokenizer

VOCAB = 512 + 300
SAMPLES = [
    "",
    "def f(x):\n    return x + 1\n",
    "Isn't it?  We'LL see \u2014 na\u00efve caf\u00e9\r\n\r\n\tX",
    "\u6f22\u5b57\u3068\u4eee\u540d mixed \u4e2dEnglish\u6587 123456 \U0001f600\U0001f600",
    "\x00\x1c\u00a0\u2028 control and odd spaces \u200b",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib")) / "json"
    return [file.read_text() for file in sorted(folder.glob("*.py"))]


@pytest.fixture(scope="module")
def file(texts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiktoken.model"
    train_tokenizer(texts, VOCAB, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(file) -> Tokenizer:
    return Tokenizer.load(file)


def split(text: str, pattern: str, wanted: list[str]) -> list[str]:
    """What tiktoken's own regex engine cuts: a piece that is a token is never merged further."""
    ranks = {bytes([i]): i for i in range(256)}
    for piece in wanted:
        ranks.setdefault(piece.encode(), len(ranks))
    encoding = tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode([i]) for i in encoding.encode_ordinary(text)]


# By the alternative of the pattern that the text is about: text as its pieces.
CUTS = [
    ["\u6f22\u5b57\u3005", "abc", "\u6587"],
    ["Hello", " world'S", "(paren", " camel", "Case's"],
    ["HTTP'S", " ABC", " XY'll"],
    ["123", "45", "x", "\u0661\u0662"],
    ["x", " +=", " ?!\r\n\n"],
    ["x", " \t\n\n", " ", " y"],
    ["x", "   ", " y"],
    ["x", " ", "7"],
]


@pytest.mark.parametrize("number", range(8))
def test_each_alternative_of_the_pattern_cuts_what_no_other_would(number):
    wanted = CUTS[number]
    text = "".join(wanted)
    assert split(text, PATTERN, wanted) == wanted
    others = "|".join(a for i, a in enumerate(ALTERNATIVES) if i != number)
    assert split(text, others, wanted) != wanted


def test_class_intersection_keeps_han_out_of_words():
    """Spec trap 28: an engine without `&&` reads it as two literal ampersands."""
    assert split("ab\u6f22cd", PATTERN, ["ab", "\u6f22", "cd"]) == ["ab", "\u6f22", "cd"]
    assert split("a&&b", PATTERN, ["a", "&&", "b"]) == ["a", "&&", "b"]


def test_pattern_agrees_with_another_regex_engine_on_random_text():
    rng = random.Random(0)
    alphabet = "aZ\u00e9\u01c5\u02b0\u0301\u6f22\u3005\u304b19\u0663'sStTlLdD  \n\r\t.,&-\u00a0"
    for _ in range(60):
        text = "".join(rng.choices(alphabet, k=80))
        wanted = [m.group() for m in regex.finditer(PATTERN, text, regex.V1)]
        assert split(text, PATTERN, wanted) == wanted


def test_decoding_gives_back_every_character(tokenizer):
    rng = random.Random(1)
    valid = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    noise = ["".join(map(chr, rng.choices(valid, k=500))) for _ in range(20)]
    for text in SAMPLES + noise:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    encoded = [tokenizer.encode(text) for text in SAMPLES]
    assert tokenizer.encode_batch(SAMPLES) == encoded
    assert [tokenizer.encode_array(text).tolist() for text in SAMPLES] == encoded


def test_every_byte_is_a_token_and_broken_utf8_becomes_the_replacement_character(tokenizer):
    singles = {tokenizer.decode_bytes([i]) for i in range(tokenizer.base)}
    assert {bytes([i]) for i in range(256)} <= singles
    half = [i for i in range(tokenizer.base) if tokenizer.decode_bytes([i]) == b"\xe6"]
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.encode("\ud800") == tokenizer.encode("\ufffd")  # half a surrogate pair


def test_special_tokens_follow_the_base_tokens_in_kimis_order(tokenizer):
    base = tokenizer.base
    assert tokenizer.vocab == base + 256 == VOCAB
    assert (tokenizer.bos, tokenizer.eos, tokenizer.im_end) == (base, base + 1, base + 2)
    assert tokenizer.pad == base + 255
    names = {id_ - base: name for name, id_ in tokenizer.specials.items()}
    assert sorted(names) == list(range(256))
    assert names[17] == "<|im_middle|>" and names[254] == "[UNK]"
    assert names[5] == f"<|reserved_token_{base + 5}|>"
    # The published ids (spec 5.1), which are these offsets from 163,584.
    assert {163_595, 163_601} == {163_584 + k for k in names if k in (11, 17)}


def test_text_cannot_write_control_tokens_unless_asked(tokenizer):
    text = "hi<|im_end|>[EOS]<|im_system|>"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.base and tokenizer.decode(ids) == text
    assert max(tokenizer.encode_batch([text])[0]) < tokenizer.base
    assert tokenizer.encode_array(text).max() < tokenizer.base
    special = tokenizer.encode(text, special=True)
    assert special[-3:] == [tokenizer.im_end, tokenizer.eos, tokenizer.specials["<|im_system|>"]]
    assert tokenizer.decode(special) == text


def reference_pieces(text: str, limit: int, run: int) -> list[str]:
    """The rule of spec 5.1, a character at a time."""
    out = []
    for at in range(0, len(text), limit):
        chunk, start, length = text[at : at + limit], 0, 0
        for i, character in enumerate(chunk):
            same = i > 0 and character.isspace() == chunk[i - 1].isspace()
            length = length + 1 if same else 1
            if length > run:
                out.append(chunk[start:i])
                start, length = i, 1
        out.append(chunk[start:])
    return out


def test_long_text_is_cut_where_the_published_code_cuts_it(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIECE", 60)
    monkeypatch.setattr(module, "MAX_RUN", 7)
    rng = random.Random(2)
    for _ in range(300):
        parts = [rng.choice("ab \n") * rng.choice([1, 2, 6, 7, 8, 14, 15, 40]) for _ in range(12)]
        text = "".join(parts)
        assert list(cut_pieces(text)) == reference_pieces(text, 60, 7)


def test_a_run_of_one_character_is_encoded_quickly_and_whole(tokenizer):
    text = "=" * (2 * MAX_RUN + 5) + " " * (MAX_RUN + 1)
    assert [len(piece) for piece in cut_pieces(text)] == [MAX_RUN, MAX_RUN, 5 + MAX_RUN, 1]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_gives_what_the_trainer_itself_would_encode(texts, tokenizer):
    bpe, trainer = make_bpe(VOCAB - 256)
    bpe.train_from_iterator(texts, trainer)
    for text in [*texts, *SAMPLES[1:4]]:
        assert tokenizer.encode(text) == bpe.encode(text).ids


def test_training_twice_gives_the_same_file(texts, tokenizer, tmp_path):
    again = train_tokenizer(texts, VOCAB, tmp_path / "again")
    assert again.digest() == tokenizer.digest()
    assert (tmp_path / "again").read_bytes() == again.model_bytes()


def test_training_on_little_text_gives_fewer_tokens(tmp_path):
    small = train_tokenizer(["abab abab"], 4_096, tmp_path / "tiktoken.model")
    assert 512 < small.vocab < 530
    assert Tokenizer.load(tmp_path).encode("ab") == small.encode("ab")


def test_file_has_a_base64_token_and_its_rank_on_each_line(file, tokenizer):
    lines = file.read_bytes().splitlines()
    assert len(lines) == tokenizer.base
    for rank, line in enumerate(lines):
        token, number = line.split(b" ")
        assert int(number) == rank
        assert tokenizer.decode_bytes([rank]) == base64.b64decode(token)


def test_byte_lengths_add_up_to_the_text(tokenizer):
    lengths = tokenizer.byte_lengths()
    assert lengths.dtype == np.int32 and not lengths[tokenizer.base :].any()
    for text in SAMPLES:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_an_id_outside_the_vocabulary_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=f"token id {VOCAB} is outside 0..{VOCAB - 1}"):
        tokenizer.decode([0, VOCAB])


BYTES = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "tokenizer .* is empty"),
        (b"\n\n", "tokenizer .* is empty"),
        (BYTES + b"hello\n", "line 257: expected 'base64 rank', found b'hello'"),
        (BYTES + b"YWI= x\n", "line 257: expected 'base64 rank'"),
        (b"version https://git-lfs\noid sha256:1\n", "is a Git LFS pointer"),
        (BYTES + b"YWI= 300\n", "ranks must be 0..256, each once"),
        (BYTES.replace(b"QQ== 65\n", b"QUE= 65\n"), "lacks 1 of the 256 bytes, first 0x41"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(content, message, tmp_path):
    path = tmp_path / "tiktoken.model"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and re.search(str(path), str(error.value))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no tokenizer at .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"folder .* has no tiktoken\.model"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="vocab is 500; a tokenizer needs at least 512"):
        train_tokenizer(["x"], 500, tmp_path / "t")
