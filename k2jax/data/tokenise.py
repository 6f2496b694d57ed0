"""Text and conversations into a folder of tokens, by several processes.

A part is written whole or not at all, and `tokens.json`, without which nothing opens the folder,
comes last. So a killed call loses the parts that were being written, and the same call goes on.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from k2jax.config import ConfigError
from k2jax.data import parts, pool
from k2jax.data.dataset import TRAIN_CHARACTERS
from k2jax.data.parts import Part
from k2jax.data.pool import Counters
from k2jax.data.readers import describe_place
from k2jax.data.shards import SUFFIX, ShardWriter, array_record
from k2jax.data.sources import HELD_OUT_ONE_IN, TOKENS, WORK, Source, find, held_out
from k2jax.data.stream import ID, UNSCORED, document
from k2jax.data.tally import Tally
from k2jax.data.token_folder import Manifest, Split
from k2jax.data.values import FIELD, Chat, Value
from k2jax.runtime.files import hold_lock, write_atomic
from k2jax.text.jinja_template import TEMPLATE
from k2jax.text.kimi_tokenizer import CONFIG, FILE, Tokenizer
from k2jax.text.open_tokenizer import open_tokenizer
from k2jax.text.supervised import encode_supervised
from k2jax.text.train_bpe import train_tokenizer

HELD_OUT_BYTES = 2_000_000  # of a large source no more is held out: enough to score
SAMPLES = 64  # parts that a tokenizer is trained on a little of each
SIDES = ("train", "heldout")
PLAN = "plan.json"
LOCK = ".lock"
TEMPLATE_FILES = (CONFIG, TEMPLATE)

# Told documents and bytes done by this call, and the share of its work that is.
Watch = Callable[[int, int, float], None]


def tokenise(
    source: str,
    folder: str | os.PathLike[str],
    *,
    tokenizer: str = "",
    vocab: int = 0,
    field: str = FIELD,
    workers: int = 0,
    watch: Watch = lambda documents, size, share: None,
) -> Manifest:
    """Write the tokens of `source` into `folder`, or go on where a killed call stopped.

    Args:
        source: see `k2jax.data.sources.find`. Records with `messages` are conversations.
        folder: new, empty, or left by the same call.
        tokenizer: a `tiktoken.model` file, or a folder with one and maybe a chat template.
        vocab: instead of `tokenizer`: train one of that many tokens on the source.
        field: of JSON records, column of tables, that has the text.
        workers: processes; 0: one for every core. The result does not depend on it.
        watch: called now and then.

    Raises:
        ConfigError: nothing to read, nothing to learn, a damaged file or record, other content in
            `folder`.
    """
    if bool(tokenizer) == bool(vocab):
        raise ConfigError("give --tokenizer FILE or --train-tokenizer VOCAB, one of them")
    text = _without(find(source, field), Path(folder))
    loaded = _load_tokenizer(tokenizer) if tokenizer else None
    array_record()  # is it there?
    folder = Path(folder)
    with _locked(folder):
        plan = _plan(text, tokenizer, loaded, vocab)
        if (folder / TOKENS).is_file():
            return _finished(folder, plan)
        _prepare(folder, plan)
        job = Job(text, folder, parts.cut(text))
        _keep_tokenizer(job, tokenizer, loaded, vocab)
        missing = [n for n in range(len(job.parts)) if not job.facts(n).is_file()]
        expected = sum(job.parts[n].size for n in missing)

        def report(counters: Counters) -> None:
            done = counters.bytes
            watch(counters.documents, done, done / max(expected, done, 1))

        pool.run(job, missing, workers, report)
        return _finish(job, plan)


@dataclasses.dataclass(frozen=True)
class Job:
    """What every process knows; called with the number of a part, it writes that part."""

    source: Source
    folder: Path
    parts: list[Part]

    @functools.cached_property
    def one_in(self) -> int:
        """Documents of which one is held out."""
        size = sum(part.size for part in self.parts)
        return max(HELD_OUT_ONE_IN, -(-size // HELD_OUT_BYTES))

    @functools.cached_property
    def tools(self) -> tuple[Tokenizer, np.ndarray]:
        """The tokenizer in the folder, and the bytes that each of its ids stands for."""
        tokenizer = open_tokenizer(self.folder)
        assert isinstance(tokenizer, Tokenizer), "it was put there first"
        return tokenizer, tokenizer.byte_lengths()

    def facts(self, number: int) -> Path:
        """A file that is there when a part has been written, and counts it."""
        return self.folder / WORK / f"{number}.json"

    def side(self, name: str, first: bool) -> str:
        """Where the document of that name goes; the first of all is always held out."""
        return SIDES[first or held_out(name, self.one_in)]

    def __call__(self, number: int, counters: Counters) -> None:
        """Write a part, or nothing when `counters.stopped`."""
        tokenizer, lengths = self.tools
        files = {s: ShardWriter(self.folder / f"{s}-{number:05d}{SUFFIX}") for s in SIDES}
        totals = dict.fromkeys(SIDES, np.zeros(5, np.int64))
        first, tally = number == 0, Tally()
        for file, name, value in self.parts[number].values(self.source, tally):
            words = _encode(tokenizer, value, file, name)
            side, first = self.side(name, first), False
            files[side].add(words)
            sizes = lengths[words & ID]
            scored = words < UNSCORED
            tally.untaught += not scored.any()
            chat = isinstance(value, Chat)
            totals[side] = totals[side] + (1, chat, len(words), scored.sum(), sizes[scored].sum())
            counters.add(1, int(sizes.sum()))
            if counters.stopped:
                return
        self._close(number, files, totals, tally)

    def _close(
        self, number: int, files: dict[str, ShardWriter], totals: dict[str, Any], tally: Tally
    ) -> None:
        splits: dict[str, Any] = {"tally": dataclasses.asdict(tally)}
        for side, file in files.items():
            shard = file.close()
            shards = (shard,) if shard else ()
            documents, chats, tokens, scored, size = totals[side].tolist()
            split = Split(documents, chats, tokens, scored, size, shards)
            splits[side] = dataclasses.asdict(split)
        write_atomic(self.facts(number), json.dumps(splits), durable=True)


def _load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer at `path`; a folder's chat template is compiled, to see that it can be."""
    tokenizer = open_tokenizer(path) if Path(path, FILE).is_file() else None
    return tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(path)


def _without(source: Source, folder: Path) -> Source:
    """The source without what was written into a folder inside of it."""
    inside = os.path.realpath(folder) + os.sep
    files = [file for file in source.files if not os.path.realpath(file).startswith(inside)]
    return dataclasses.replace(source, files=tuple(files))


def _encode(tokenizer: Tokenizer, value: Value, file: Path, name: str) -> np.ndarray:
    if isinstance(value, str):
        text = tokenizer.encode_array(value)
        return document(np.concatenate(([tokenizer.bos], text, [tokenizer.eos])))
    try:
        ids, learned = encode_supervised(tokenizer, value.messages, value.tools)
    except (ConfigError, RecursionError) as error:
        where = describe_place(file, int(name.rpartition(":")[2]))
        raise ConfigError(f"{file} {where}: {error}") from None
    return document(ids, ~learned)


def _plan(source: Source, path: str, loaded: Tokenizer | None, vocab: int) -> dict[str, Any]:
    """All that the tokens depend on."""
    stats = [(source.name(file), file.stat()) for file in source.files]
    files = [Path(path) / name for name in TEMPLATE_FILES if (Path(path) / name).is_file()]
    template = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {
        "source": source.title,
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "field": source.field,
        "tokenizer": loaded.digest() if loaded else f"trained on the source, vocab {vocab}",
        "template": template if path and files else "",
    }


def _check_plan(folder: Path, before: dict[str, Any], plan: dict[str, Any]) -> None:
    if before.get("files") != plan["files"]:
        raise ConfigError(
            f"{folder} holds tokens of {before.get('source')} as it was then, other files than"
            f" {plan['source']} has; give another folder"
        )
    for key in ("tokenizer", "template", "field"):
        if before.get(key) != plan[key]:
            raise ConfigError(
                f"{folder} holds tokens made with {key} {before.get(key) or 'none'}, not"
                f" {plan[key] or 'none'}; give another folder"
            )


def _finished(folder: Path, plan: dict[str, Any]) -> Manifest:
    manifest = Manifest.read(folder)
    _check_plan(folder, manifest.plan, plan)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return manifest


def _prepare(folder: Path, plan: dict[str, Any]) -> None:
    """Make the folder ready for parts, or see that it is of the same plan."""
    before = folder / WORK / PLAN
    if before.is_file():
        _check_plan(folder, json.loads(before.read_text()), plan)
        for pattern in (".train-*", ".heldout-*", f".{FILE}.*", f".{TOKENS}.*"):
            for left in folder.glob(pattern):
                left.unlink()
        return
    if others := [entry.name for entry in folder.iterdir() if entry.name not in (WORK, LOCK)]:
        raise ConfigError(f"{folder} is not empty: it has {min(others)}; give another folder")
    (folder / WORK).mkdir(exist_ok=True)
    write_atomic(before, json.dumps(plan), durable=True)


def _keep_tokenizer(job: Job, path: str, loaded: Tokenizer | None, vocab: int) -> None:
    """Put the tokenizer into the folder, training it first where none was loaded."""
    if (job.folder / FILE).is_file():
        return
    for name in TEMPLATE_FILES:
        if loaded and (Path(path) / name).is_file():
            shutil.copyfile(Path(path) / name, job.folder / name)
    if loaded:
        loaded.save(job.folder / FILE)
    else:
        train_tokenizer(_sample(job), vocab, job.folder / FILE)


def _sample(job: Job) -> Iterator[str]:
    """Some of the text that is not held out, from all over the source."""
    chosen = job.parts[:: -(-len(job.parts) // SAMPLES)]
    for number, part in enumerate(chosen):
        left = TRAIN_CHARACTERS // len(chosen)
        for text in _texts(job, part, first=number == 0):
            yield text
            left -= len(text)
            if left <= 0:
                break


def _texts(job: Job, part: Part, first: bool) -> Iterator[str]:
    for _, name, value in islice(part.values(job.source), int(first), None):
        if job.side(name, False) == "heldout":
            continue
        if not isinstance(value, Chat):
            yield value
            continue
        for message in value.messages:
            if isinstance(message, dict) and isinstance(message.get("content"), str):
                yield message["content"]


def _finish(job: Job, plan: dict[str, Any]) -> Manifest:
    """Put the parts together: from here on the folder can be opened."""
    sides, tally = dict.fromkeys(SIDES, Split()), Tally()
    for number in range(len(job.parts)):
        facts = json.loads(job.facts(number).read_text())
        sides = {side: sides[side] + Split.from_json(facts[side]) for side in SIDES}
        tally += Tally(**facts.get("tally", {}))
    if not all(split.documents for split in sides.values()):
        count = sum(split.documents for split in sides.values())
        raise ConfigError(
            f"{job.source.title} has {count} document(s) with text; training and held-out text"
            " need at least one each"
        )
    if not sides["train"].scored:
        raise ConfigError(f"{job.source.title} teaches nothing: no token of it is learned")
    tokenizer = Tokenizer.load(job.folder)
    counts = dataclasses.asdict(tally)
    manifest = Manifest(plan, tokenizer.digest(), tokenizer.vocab, **sides, tally=counts)
    write_atomic(job.folder / TOKENS, manifest.to_json(), durable=True)
    shutil.rmtree(job.folder / WORK)
    return manifest


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other calls out; a killed process holds no lock. The system's errors get one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(folder / LOCK):
            yield
    except BlockingIOError:
        raise ConfigError(f"another process is writing {folder}") from None
    except OSError as error:
        what = os.fsdecode(error.filename) if error.filename else str(folder)
        raise ConfigError(f"cannot read or write {what}: {error.strerror or error}") from None
