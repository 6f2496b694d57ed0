"""The engine under load: `python bench/serve_load.py MODEL [options]`; prints one JSON line.

MODEL is a run's or a published folder with a context of at least 576. At each number of streams a
closed loop: the next request when one ends. Prompts are token ids (a text would measure tokenizers
too), lengths 16 to 512, log-uniform; 64 new tokens, greedy, no stop. One pass of other tokens goes
before, so that no prefix cache is warm. Peers in the same run, by turns, so that all see the same
machine:

--llama-server PATH --gguf FILE: llama.cpp's server, 2 threads.
--transformers FOLDER: `generate` of the export in FOLDER (float32), static batches.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.request

os.environ.setdefault("JAX_PLATFORMS", "cpu")

NEW, VOCAB, LONGEST = 64, 16_128, 512
REQUESTS = {1: 8, 8: 32, 16: 48}
PORT = 8_417


def prompts(streams: int, salt: int = 0) -> list[list[int]]:
    """The load of so many streams. Another salt: the same lengths, other tokens."""
    draw = random.Random(streams)
    lengths = [round(16 * 32 ** draw.random()) for _ in range(REQUESTS.get(streams, 3 * streams))]
    draw = random.Random(1000 * salt + streams)
    return [[VOCAB, *(draw.randrange(VOCAB) for _ in range(n - 1))] for n in lengths]


def summarise(streams: int, new: int, seconds: float, first: list[float]) -> dict[str, float]:
    """Keys of one load."""
    result = {f"tok_s_{streams}": round(new / seconds, 1)}
    if first:
        result[f"ttft_ms_{streams}"] = round(1e3 * statistics.median(first), 1)
    return result


def run_load(ask, work: list[list[int]], streams: int) -> tuple[int, float, list[float]]:
    """New tokens, seconds, and seconds to each first token.

    Args:
        ask: from a prompt to the number of new tokens and the seconds to the first one.
        work: prompts.
        streams: threads that ask, one request at a time each.
    """
    queue, done = list(reversed(work)), []

    def client() -> None:
        while True:
            try:
                prompt = queue.pop()
            except IndexError:
                return
            done.append(ask(prompt))

    began = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(n for n, _ in done), time.perf_counter() - began, [first for _, first in done]


class Ours:
    """The engine in this process."""

    def __init__(self, folder: str, rows: int):
        began = time.perf_counter()
        import k2jax
        from k2jax.inference.engine import Engine
        from k2jax.inference.request import EngineSettings, Request

        k2jax.prepare()
        self.request = Request
        model = k2jax.load(folder)
        if model.config.context < LONGEST + NEW:
            raise SystemExit(f"{folder}: context {model.config.context}, {LONGEST + NEW} needed")
        self.engine = Engine(model, EngineSettings(rows=rows)).start()
        self.facts = {"ready_s": round(time.perf_counter() - began, 1)}

    def run(self, work: list[list[int]], streams: int) -> dict[str, float]:
        """One load: each stream submits its next request from the event that ended its last."""
        queue, first, done = list(reversed(work)), [], threading.Event()
        new = [0]
        left = [len(work)]

        def submit() -> None:
            if queue:
                began, seen = time.perf_counter(), []

                def on_output(output) -> None:
                    if output.ids and not seen:
                        seen.append(1)
                        first.append(time.perf_counter() - began)
                    new[0] += len(output.ids)
                    if output.finish_reason:
                        left[0] -= 1
                        submit()
                        if not left[0]:
                            done.set()

                self.engine.submit(self.request(tuple(queue.pop()), NEW), on_output)

        began = time.perf_counter()
        for _ in range(streams):
            submit()
        done.wait()
        return summarise(streams, new[0], time.perf_counter() - began, first)

    def close(self) -> dict[str, float]:
        """Facts of the end."""
        self.engine.close()
        status = open("/proc/self/status").read().splitlines()
        rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        return {"rss_mb": rss // 1024}


class Llama:
    """llama.cpp's server."""

    def __init__(self, server: str, gguf: str):
        command = f"{server} -m {gguf} --host 127.0.0.1 --port {PORT} -t 2 -np 16 -c 16384"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        began = time.perf_counter()
        self.server = subprocess.Popen([*command.split(), "--no-webui"], **quiet)
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
                break
            except OSError:
                if self.server.poll() is not None or time.perf_counter() - began > 60:
                    raise SystemExit("llama-server did not start") from None
                time.sleep(0.05)
        self.facts = {"ready_s": round(time.perf_counter() - began, 1)}

    def ask(self, prompt: list[int]) -> tuple[int, float]:
        """One request, streamed."""
        body = {"prompt": prompt, "n_predict": NEW, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "cache_prompt": False}
        began, first, new = time.perf_counter(), 0.0, 0
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            for line in answer:
                if line.startswith(b"data:"):
                    first = first or time.perf_counter() - began
                    data = json.loads(line[5:])
                    new = data.get("tokens_predicted") or new
        return new, first

    def run(self, work: list[list[int]], streams: int) -> dict[str, float]:
        """One load."""
        return summarise(streams, *run_load(self.ask, work, streams))

    def close(self) -> dict[str, float]:
        """Facts of the end."""
        status = open(f"/proc/{self.server.pid}/status").read().splitlines()
        rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        self.server.terminate()
        self.server.wait(30)
        return {"rss_mb": rss // 1024}


class Transformers:
    """Static batches of `generate`, padded on the left; nothing streams."""

    def __init__(self, folder: str):
        import torch
        import transformers

        torch.set_num_threads(2)
        self.torch = torch
        began = time.perf_counter()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        self.facts = {"ready_s": round(time.perf_counter() - began, 1)}

    def run(self, work: list[list[int]], streams: int) -> dict[str, float]:
        """One load."""
        began = time.perf_counter()
        for at in range(0, len(work), streams):
            batch = work[at : at + streams]
            longest = max(map(len, batch))
            ids = self.torch.tensor([[0] * (longest - len(p)) + p for p in batch])
            seen = self.torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
            with self.torch.no_grad():
                self.model.generate(
                    ids,
                    attention_mask=seen,
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    do_sample=False,
                    pad_token_id=0,
                )
        return summarise(streams, NEW * len(work), time.perf_counter() - began, [])

    def close(self) -> dict[str, float]:
        """Nothing."""
        return {}


def main() -> None:
    """Measure, one system and one load after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--streams", default="1,8,16")
    parser.add_argument("--llama-server", default="")
    parser.add_argument("--gguf", default="")
    parser.add_argument("--transformers", default="")
    args = parser.parse_args()
    streams = [int(n) for n in args.streams.split(",")]
    systems = {"k2jax": Ours(args.model, max(streams))}
    if args.llama_server:
        systems["llama.cpp"] = Llama(args.llama_server, args.gguf)
    if args.transformers:
        systems["transformers"] = Transformers(args.transformers)
    results = {name: dict(system.facts) for name, system in systems.items()}
    for count in streams:
        for name, system in systems.items():
            if name != "transformers":
                system.run(prompts(count, 1), count)
            results[name] |= system.run(prompts(count), count)
    for name, system in systems.items():
        results[name] |= system.close()
    for name in set(results) - {"k2jax"}:
        for count in streams:
            key = f"tok_s_{count}"
            results["k2jax"][f"{key}_to_{name}"] = round(
                results["k2jax"][key] / results[name][key], 2
            )
    print(json.dumps({"bench": "serve_load", "cpus": os.cpu_count(), **results}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
