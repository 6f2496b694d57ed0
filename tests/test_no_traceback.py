"""No bytes on the command line, in a file or on standard input end in a traceback.

Every verb is called in this process with what hypothesis draws; whatever it is, the answer is an
exit code, and one line on stderr where it is 2. The examples are the same in every run, for half a
minute; `make test-all` draws others for an hour (`K2JAX_FUZZ` is how many times as many).
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import sys

import pytest

from k2jax import cli
from k2jax.commands.generate import read_conversation
from k2jax.config import ConfigError, field_names

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TIMES = int(os.environ.get("K2JAX_FUZZ", "1"))
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def examples(count):
    return hypothesis.settings(
        deadline=None,
        derandomize=TIMES == 1,
        max_examples=count * TIMES,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def decode(raw: bytes) -> str:
    """As Python decodes the command line."""
    return os.fsdecode(raw.replace(b"\0", b""))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=12,
)
KEYS = st.sampled_from([
    "role", "content", "name", "tool_calls", "tool_call_id", "weight", "reasoning", "function",
    "function_call", "id", "type", "arguments", "text", "messages", "tools", "user", "assistant",
    "vocab_size", "hidden_size", "rope_scaling", "model", "chat_template", "added_tokens",
])  # fmt: skip
NEAR_JSON = st.recursive(
    JSON | KEYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=20,
)
# Half surrogate pairs as JSON spells them, deep nesting, and numbers that no machine has.
SPELLED = st.sampled_from([
    b'{"text": "\\ud83d"}', b"[" * 3_000, b'{"text":' * 3_000, b"1e999", b"9" * 5_000, b"NaN",
    b'{"messages": [{"role": "user", "content": "\\udc00"}]}', b'{"text": "a"}\n{"text": "b"}',
])  # fmt: skip
LINES = st.lists(NEAR_JSON.map(lambda value: json.dumps(value).encode()), max_size=5).map(
    b"\n".join
)
BYTES = st.binary(max_size=400) | SPELLED | LINES | NEAR_JSON.map(lambda v: json.dumps(v).encode())
MARKED = st.tuples(
    st.sampled_from([
        b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PAR1", b"ARROW1\0\0", b"BZh9",
        b"version https://git-lfs.github.com/spec/v1\n", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0",
    ]),
    BYTES,
).map(b"".join)  # fmt: skip
CONTENT = MARKED | BYTES.map(gzip.compress) | BYTES.map(bz2.compress) | BYTES.map(lzma.compress)
SUFFIX = st.sampled_from([
    "", ".txt", ".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".bin", ".txt.gz", ".jsonl.xz",
    ".json.bz2", ".jsonl.zst", ".parquet", ".arrow", ".arrayrecord", ".gz", ".log",
])  # fmt: skip


def call(*argv: str) -> tuple[int, str]:
    """Exit code and stderr of one command, printed to a terminal of strict ASCII."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(list(argv))
        except SystemExit as ended:  # --help
            code = int(ended.code or 0)
        out.flush()
    err.flush()
    lines = err.buffer.getvalue().decode()
    assert code in (0, 2), (code, lines)
    assert "Traceback" not in lines
    assert code == 0 or lines.count("\n") == 1, lines
    return code, lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@examples(150)
@hypothesis.given(content=CONTENT, suffix=SUFFIX, field=st.sampled_from(["text", "id", "role"]))
def test_data_answers_any_file(folder, tmp_path_factory, content, suffix, field):
    file = folder / f"a{suffix}"
    file.write_bytes(content)
    out = tmp_path_factory.mktemp("out") / "tokens"
    call("data", str(file), str(out), "--train-tokenizer", "512", "--workers", "1",
         "--field", field)  # fmt: skip


@examples(30)
@hypothesis.given(files=st.lists(st.tuples(st.binary(min_size=1, max_size=8), SUFFIX, CONTENT)))
def test_data_answers_any_folder(tmp_path_factory, files):
    source = tmp_path_factory.mktemp("source")
    for stem, suffix, content in files:
        name = decode(stem.replace(b"/", b"") + suffix.encode())
        with contextlib.suppress(OSError):  # names such as "." and ".."
            (source / name).write_bytes(content)
    out = tmp_path_factory.mktemp("out") / "tokens"
    call("data", str(source), str(out), "--train-tokenizer", "512", "--workers", "1")


@examples(100)
@hypothesis.given(content=MARKED)
def test_a_conversation_of_any_bytes_is_read_or_refused(folder, content):
    file = folder / "messages.json"
    file.write_bytes(content)
    with contextlib.suppress(ConfigError):
        messages, tools = read_conversation(str(file))
        assert isinstance(messages, list) and isinstance(tools, list)


@examples(30)
@hypothesis.given(content=MARKED)
def test_standard_input_may_hold_any_bytes(folder, content):
    file = folder / "stdin"
    file.write_bytes(content)
    before = os.dup(0)
    with file.open("rb") as source:
        os.dup2(source.fileno(), 0)
    try:
        call("generate", str(folder / "no model"), "--messages", "/dev/stdin")
        call("data", "/dev/stdin", str(folder / "none"), "--train-tokenizer", "400")
        call("evaluate", str(folder / "no model"), "--data", "/dev/stdin")
    finally:
        os.dup2(before, 0)
        os.close(before)


# Verbs that answer a foreign folder or a mistake before anything is computed.
VERBS = {
    "describe": ["{}"],
    "plan": ["{}", "--target", "v5p:2x2x1"],
    "generate": ["{}", "--prompt", "x"],
    "evaluate": ["{}", "--data", "{}"],
    "convert": ["{}", "{}-out", "--dry-run"],
    "report": ["{}"],
}


@pytest.mark.parametrize("verb", VERBS)
@examples(25)
@hypothesis.given(
    files=st.dictionaries(
        st.sampled_from([
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "model.safetensors.index.json", "tiktoken.model", "tokenizer_config.json",
            "chat_template.jinja", "metrics.jsonl", "run.json", "events.jsonl", "tokens.json",
            "conversion.json", "manifest.sha256",
        ]),
        MARKED,
        max_size=5,
    )
)  # fmt: skip
def test_every_verb_answers_any_folder(tmp_path_factory, verb, files):
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    for name, content in files.items():
        (checkpoint / name).write_bytes(content)
    call(verb, *(word.replace("{}", str(checkpoint)) for word in VERBS[verb]))


WORDS = st.lists(
    st.binary(max_size=12).map(decode)
    | st.sampled_from(["--help", "--json", "--prompt", "--out", "tiny", "--data.path", "-", "--"])
    | st.sampled_from([f"--{name}" for name in field_names()]),
    max_size=5,
)


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
@examples(40)
@hypothesis.example(words=["", "--", "--"])
@hypothesis.given(words=WORDS)
def test_every_verb_answers_any_command_line(verb, words):
    # Nothing is ever trained or written: there is no such data, no such checkpoint.
    last = {
        "train": ["--data.path", "/no/such/data"],
        "report": ["/no/such/run"],
        "synth": ["--spec", "/no/such/file"],
    }.get(verb, [])
    call(*([verb] if verb else []), *words, *last)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_is_printed_in_any_terminal(monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(cli, "_read_settings", lambda *a: sys.stdout.write("\u2603 \udce9\n"))
    with contextlib.suppress(Exception):
        cli.main(["describe", "no config"])
    out.flush()
    shown = out.buffer.getvalue().decode(encoding)
    assert shown.endswith("\\udce9\n") and (encoding == "utf-8") == ("\u2603" in shown)
