"""An engine without a model: it says what a script has for each prompt, a token a step.

The server's protocol is tested against it; what it does besides is what the real one promises.
"""

import dataclasses
import threading
from collections.abc import Callable

from k2jax.inference.request import EngineStats, Output, QueueFull, Request, TokenLogprob
from k2jax.text.incremental_decode import TextStream
from k2jax.text.stop_text import StopText


@dataclasses.dataclass
class Sequence:
    request: Request
    on_output: Callable
    ids: list[int]
    text: TextStream
    stop: StopText
    place: int = 0
    aborted: bool = False


class ScriptedEngine:
    """`script(request)` has the ids that a request gets; after them an id that ends replies."""

    def __init__(self, tokenizer, script, rows=16, queue=64, seconds=0.0):
        self.tokenizer, self.script = tokenizer, script
        self.rows, self.queue, self.seconds = rows, queue, seconds
        self.error = ""
        self.requests: list[Request] = []
        self.aborted: list[int] = []
        self.new_tokens = 0
        self._lock = threading.Condition()
        self._sequences: dict[int, Sequence] = {}
        self._number, self._closed = 0, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request, on_output):
        if request.constraint is not None:
            request.constraint.start(request.max_new_tokens)
        with self._lock:
            if len(self._sequences) >= self.rows + self.queue:
                raise QueueFull
            self.requests.append(request)
            self._number += 1
            ids = [*self.script(request), self.tokenizer.stops[-1]]
            text = TextStream(self.tokenizer)
            self._sequences[self._number] = Sequence(
                request, on_output, ids, text, StopText(request.stop)
            )
            self._lock.notify()
            return self._number

    def abort(self, number):
        with self._lock:
            if number in self._sequences:
                self._sequences[number].aborted = True
                self.aborted.append(number)

    def stats(self):
        count = len(self._sequences)
        return EngineStats(running=min(count, self.rows), waiting=max(count - self.rows, 0))

    def close(self):
        with self._lock:
            self._closed = True
            self._lock.notify()
        self._thread.join()

    def _run(self):
        pause = threading.Event()
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._sequences)
                if self._closed:
                    return
                turn = list(self._sequences.items())[: self.rows]
                outputs = [(number, sequence, self._step(sequence)) for number, sequence in turn]
                for number, _, output in outputs:
                    if output.finish_reason:
                        del self._sequences[number]
            for _, sequence, output in outputs:
                sequence.on_output(output)
            if self.seconds:
                pause.wait(self.seconds)

    def _step(self, sequence):
        request = sequence.request
        base = {"prompt_tokens": len(request.prompt)}
        if request.prompt_logprobs is not None and not sequence.place:
            pairs = list(zip(request.prompt, range(len(request.prompt)), strict=True))
            scores = [None, *(logprob(i, request.prompt_logprobs) for i, _ in pairs[1:])]
            base["prompt_logprobs"] = tuple(scores)
        if sequence.aborted:
            return Output(finish_reason="abort", **base)
        if not request.max_new_tokens:
            return Output(finish_reason="length", **base)
        id_ = sequence.ids[min(sequence.place, len(sequence.ids) - 1)]
        if id_ < 0:
            return Output(finish_reason="error", error="logits are not finite", **base)
        sequence.place += 1
        self.new_tokens += 1
        ends = id_ in request.stop_ids
        text = "" if ends else sequence.stop.feed(sequence.text.feed([id_]))
        finish, stopped = None, None
        if ends or sequence.stop.matched:
            finish, stopped = "stop", sequence.stop.matched or id_
        elif sequence.place == request.max_new_tokens:
            finish = "length"
        if finish:
            text += "" if sequence.stop.matched else sequence.stop.feed(sequence.text.close())
            text += sequence.stop.close()
        scores = () if request.logprobs is None else (logprob(id_, request.logprobs),)
        return Output((id_,), text, scores, finish_reason=finish, stopped_by=stopped, **base)


def logprob(id_, top):
    """Made up: the id's own, and the `top` ids from 97 on."""
    ranked = tuple((97 + i, -0.5 - i) for i in range(top))
    return TokenLogprob(id_, dict(ranked).get(id_, -2.0 - id_ / 1000), ranked)
