"""Speed of the input pipeline on one core: `python bench/data.py [MEGABYTES]`, one JSON line.

Tokenising: Python's own source, repeated up to MEGABYTES, by K2's pre-split and a tokenizer of
4,096 tokens, as `k2jax data` does it, in one process. Reading: rows of 4,096 and of 256 tokens in
shuffled order from the folder that this leaves, segment ids and all, and rows of conversations of
some 300 tokens. For comparison, the ArrayRecord package's own reader fetches whole records in
random order and does nothing with them. Each is done three times; rates are medians, by the
processor's time and by the clock.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from k2jax.config import RunConfig
from k2jax.configs import load
from k2jax.data import Batches, open_data
from k2jax.data.shards import Shards
from k2jax.data.sources import find
from k2jax.data.tokenise import tokenise

REPEATS = 3
VOCAB = 4_096
READ_TOKENS = 4_000_000
K2_SECONDS = 42.7  # the least a step can take: k2jax plan kimi_k2 --target v5p:8x8x16


def rates(work: Callable[[], float]) -> dict[str, float]:
    """Median amounts per second of `work`, which returns the amount it did."""
    found: dict[str, list[float]] = {"cpu": [], "wall": []}
    for _ in range(REPEATS):
        cpu, wall = time.process_time(), time.perf_counter()
        amount = work()
        found["cpu"].append(amount / (time.process_time() - cpu))
        found["wall"].append(amount / (time.perf_counter() - wall))
    return {f"per_{name}_second": round(statistics.median(r), 3) for name, r in found.items()}


def write_text(folder: Path, size: int) -> Path:
    """JSON lines of the standard library's modules, about `size` bytes of text."""
    texts = [document.text for document in find("stdlib").documents()]
    file, written = folder / "text.jsonl", 0
    with file.open("w") as lines:
        while written < size:
            for text in texts:
                lines.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                if written >= size:
                    break
    return file


def write_conversations(folder: Path, size: int) -> Path:
    """JSON lines of conversations, about `size` bytes: modules cut into questions and answers."""
    file, cut = folder / "chat.jsonl", 256
    texts = "".join(document.text for document in find("stdlib").documents())[:size]
    pieces = [texts[at : at + cut] for at in range(0, len(texts), cut)]
    with file.open("w") as lines:
        for at in range(0, len(pieces) - 3, 4):
            roles = zip(("user", "assistant") * 2, pieces[at : at + 4], strict=True)
            talk = [{"role": role, "content": text} for role, text in roles]
            lines.write(json.dumps({"messages": talk}) + "\n")
    return file


def tokenising(text: Path, folder: Path) -> dict[str, float]:
    """Megabytes of text a second, one process."""
    numbers = iter(range(REPEATS))

    def once() -> float:
        target = folder / f"tokens{next(numbers)}"
        manifest = tokenise(str(text), target, tokenizer=str(folder / "tok"), workers=1)
        return (manifest.train.bytes + manifest.heldout.bytes) / 1e6

    return rates(once)


def reading(batches: Batches) -> dict[str, float]:
    """Millions of tokens a second of batches, in the order of training."""
    steps = max(READ_TOKENS // (batches.rows * batches.context), 1)
    start = iter(range(0, REPEATS * steps, steps))

    def once() -> float:
        first = next(start)
        for step in range(first, first + steps):
            batches.batch(step)
        return steps * batches.rows * batches.context / 1e6

    return rates(once)


def records(shards: Shards) -> dict[str, float]:
    """Millions of tokens a second of whole records in random order, and nothing made of them."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    source = ArrayRecordDataSource([str(path) for path in shards.paths])
    rng = np.random.default_rng(0)

    def once() -> float:
        size = 0
        for _ in range(max(READ_TOKENS // 4_096 // 8, 1)):
            size += sum(map(len, source.__getitems__(rng.integers(0, len(source), 8).tolist())))
        return size / 4 / 1e6

    return rates(once)


def k2_needs(run: RunConfig, hosts: int, seconds: float) -> dict[str, float]:
    """What a host of K2's run reads, if a step takes `seconds`."""
    tokens = run.data.rows * run.data.context // hosts
    needed = {"step_tokens": tokens, "tokens_a_second": round(tokens / seconds)}
    return {"hosts": hosts, "step_seconds": seconds} | needed


def main(size: int) -> None:
    """Measure and print the line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenise("stdlib", folder / "first", vocab=VOCAB, workers=1)
        os.symlink(folder / "first", folder / "tok")
        text = write_text(folder, size * 1_000_000)
        result = {"tokenise_megabytes": tokenising(text, folder)}
        data = open_data(str(folder / "tokens0"), vocab=VOCAB)
        for rows, context in ((8, 4_096), (64, 256)):
            key = f"read_million_tokens_{rows}x{context}"
            result[key] = reading(Batches(data.train, rows, context, 0))
        talks = write_conversations(folder, 8_000_000)
        tokenise(str(talks), folder / "talks", tokenizer=str(folder / "tok"), workers=1)
        talking = Batches(open_data(str(folder / "talks"), vocab=VOCAB).train, 8, 4_096, 0)
        result["read_conversations_million_tokens_8x4096"] = reading(talking)
        assert isinstance(data.train, Shards)
        result["records_million_tokens"] = records(data.train)
        result["k2_host"] = k2_needs(load("kimi_k2"), hosts=256, seconds=K2_SECONDS)
        size_on_disk = sum(path.stat().st_size for path in data.train.paths)
        result["disk_bytes_a_token"] = round(size_on_disk / data.train.size, 3)
    facts = {
        "text_megabytes": size,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
    print(json.dumps({"bench": "data"} | result | facts))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
