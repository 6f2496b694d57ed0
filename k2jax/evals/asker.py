"""Turns what a task asks into requests, and their results into an answer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from k2jax.evals.encode import Row, cut_left, each_window, encode_pair
from k2jax.evals.ledger import Key
from k2jax.evals.ledger_parts import (
    Unanswered,
    derive_from,
    describe_continuation,
    describe_scored,
)
from k2jax.evals.scorer import Scorer
from k2jax.evals.task import ERROR, TRUNCATED, Answer, Ask, Call, Choose, Generate, TaskSettings
from k2jax.inference.request import Request, Result, Sampling
from k2jax.text.kimi_template import encode
from k2jax.text.reply import ReplyStream


class Asked(NamedTuple):
    """What came of a question.

    Attributes:
        answer: None: there is none.
        parts: what the ledger has of each of its requests.
        result: of a verdict, where there is no answer.
        reason: why there is none.
    """

    answer: Answer | None
    parts: list[dict[str, Any]]
    result: str = ""
    reason: str = ""


class Asker:
    """Asks a scorer.

    Attributes:
        scorer: that answers.
        settings: of the task.
    """

    def __init__(self, scorer: Scorer, settings: TaskSettings, seed: int):
        """Take the settings of a task, and the seed of all draws.

        A sample's draws do not depend on what else is asked.
        """
        self.scorer, self._words = scorer, scorer.tokenizer
        self.settings, self._seed = settings, seed

    def submit(self, key: Key, turn: int, ask: Ask, then: Callable[[Asked], None]) -> None:
        """Ask; `then` gets the answer, perhaps at once.

        Args:
            key: of the sample.
            turn: of the conversation, from 0.
            ask: what is asked.
            then: is called once.

        Raises:
            ConfigError: a conversation is malformed, or the model has no chat template.
        """
        if isinstance(ask, Generate):
            self._generate(key, turn, ask, then)
        elif isinstance(ask, Choose):
            rows = [self._pair(ask.context, choice) for choice in ask.choices]
            self._score(rows, lambda parts: Asked(self._compare(parts), parts), then)
        else:
            ids = self._words.encode(ask.text)
            rows = list(each_window(ids, self._words.bos, self.scorer.context))
            self._score(rows, lambda parts: Asked(self._add_up(parts), parts), then)

    def _generate(self, key: Key, turn: int, ask: Generate, then: Callable[[Asked], None]) -> None:
        settings = self.settings
        prompt = tuple(self._write_prompt(ask))
        room = self.scorer.context - len(prompt)
        if room < 1:
            reason = f"the prompt has {len(prompt)} tokens, the context is {self.scorer.context}"
            then(Asked(None, [], TRUNCATED, reason))
            return
        sampling = Sampling(
            settings.temperature,
            # Without a temperature there is nothing to draw from.
            settings.top_p if settings.temperature else 1.0,
            seed=derive_from(self._seed, *key, turn),
        )
        request = Request(
            prompt,
            min(settings.max_new_tokens, room),
            sampling,
            frozenset(self._words.stops),
            () if ask.messages else settings.stop,
            logprobs=0,
        )
        self.scorer.submit(request, lambda result: then(self._read(ask, prompt, result)))

    def _write_prompt(self, ask: Generate) -> list[int]:
        if not ask.messages:
            return [self._words.bos, *self._words.encode(ask.prompt)]
        return encode(self._words, ask.messages, ask.tools, variables=self.settings.variables)

    def _read(self, ask: Generate, prompt: Sequence[int], result: Result) -> Asked:
        try:
            part = describe_continuation(prompt, result)
        except Unanswered as error:
            return Asked(None, [], ERROR, str(error))
        is_truncated, tokens = result.finish_reason == "length", len(result.ids)
        if not ask.messages:
            answer = Answer(result.text, is_truncated=is_truncated, tokens=tokens)
            return Asked(answer, [part])
        stream = ReplyStream(self._words, prompt, self.settings.stop)
        stream.feed(result.ids)
        stream.close()
        reply = stream.reply()
        calls = tuple(Call(call.name, call.arguments) for call in reply.calls if call.complete)
        is_truncated = is_truncated and not stream.stopped_by
        answer = Answer(
            reply.content,
            reply.reasoning,
            calls,
            reply.message(),
            is_truncated=is_truncated,
            tokens=tokens,
        )
        return Asked(answer, [part])

    def _pair(self, context: str, choice: str) -> Row:
        row = encode_pair(
            lambda text: [self._words.bos, *self._words.encode(text)], context, choice
        )
        return cut_left(*row, self.scorer.context)

    def _score(
        self,
        rows: list[Row],
        finish: Callable[[list[dict[str, Any]]], Asked],
        then: Callable[[Asked], None],
    ) -> None:
        found: dict[int, dict[str, Any]] = {}
        failures: list[str] = []
        if not rows:
            then(finish([]))

        def end(at: int, result: Result) -> None:
            try:
                found[at] = describe_scored(rows[at][0], result)
            except Unanswered as error:
                found[at] = {}
                failures.append(str(error))
            if len(found) < len(rows):
                return
            parts = [found[i] for i in range(len(rows))]
            then(Asked(None, [], ERROR, failures[0]) if failures else finish(parts))

        for at, (context, rest) in enumerate(rows):
            request = Request(
                (*context, *rest), 0, prompt_logprobs=1, prompt_logprobs_from=len(context)
            )
            self.scorer.submit(request, functools.partial(end, at))

    def _compare(self, parts: list[dict[str, Any]]) -> Answer:
        return Answer(
            logprobs=tuple(float(sum(part["logprobs"])) for part in parts),
            is_greedy=tuple(part["is_greedy"] for part in parts),
            tokens=sum(len(part["ids"]) for part in parts),
        )

    def _add_up(self, parts: list[dict[str, Any]]) -> Answer:
        total = float(sum(sum(part["logprobs"]) for part in parts))
        return Answer(logprobs=(total,), tokens=sum(len(part["ids"]) for part in parts))
