"""One step of the engine: what is planned is computed, and every new token is looked at."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from k2jax.config import one_line
from k2jax.inference.executor import REJECTED, Answer, Begin, Call, Executor, Masks, Plan
from k2jax.inference.pace import Pace
from k2jax.inference.request import EngineSettings, EngineStats, TokenLogprob
from k2jax.inference.sampler import NOT_FINITE, NOTHING_ALLOWED
from k2jax.inference.scheduler import Part, Scheduler, Work, is_drafted
from k2jax.inference.sequence import Sequence

POISONED = "the model's logits of this sequence are not finite"
Items = list[tuple[Sequence, Part]]


class Stepper:
    """Turns the scheduler's work into calls, and answers into events."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        settings: EngineSettings,
        stats: EngineStats,
    ):
        """Share the engine's parts."""
        self._executor, self._scheduler, self._stats = executor, scheduler, stats
        self._pace = Pace(executor.runner.sizes, settings.prefill_share)
        self._keeps_experts = settings.experts
        self._ended: list[Sequence] = []
        self._broken: dict[Sequence, str] = {}  # whose constraint raised, and what

    def step(self, close: Callable[[Iterable[Sequence]], None]) -> bool:
        """Compute one step; False: there is nothing to do.

        Args:
            close: called with the sequences that ended.
        """
        work = self._scheduler.plan(self._pace.most, self._pace.allow())
        if not (work.prefill or work.decode):
            return False
        self._note_started(work)
        runner = self._executor.runner
        decoding = self._cut(work.decode, runner.row_sizes[-1])
        batches = [*decoding, *self._cut(work.prefill, runner.sizes[-1])]
        plan = Plan(
            [
                Begin(
                    s.row, s.request.sampling, s.request.prompt, s.tokens[len(s.request.prompt) :]
                )
                for s in work.started
            ],
            [_call(items, number < len(decoding)) for number, items in enumerate(batches)],
            any(s.request.constraint for items in batches for s, _ in items),
        )
        began = time.perf_counter()
        answers = self._executor.run(plan, lambda: self._masks(batches))
        self._pace.note(len(work.prefill), bool(work.decode), time.perf_counter() - began)
        for items, call, answer in zip(batches, plan.calls, answers, strict=True):
            self._read(items, call, answer)
        self._stats.steps_total += 1
        if self._ended:
            close(self._ended)
            self._ended.clear()
        return True

    def _cut(self, items: Items, most: int) -> list[Items]:
        """Cut into calls that are one program each: all of those are compiled at the start."""
        share, seen = most // self._executor.runner.shards, Counter[int]()
        batches: list[Items] = []
        for s, part in items:
            number = seen[s.part] // share
            seen[s.part] += len(part.tokens) if is_drafted(part) else 1
            batches += [[] for _ in range(number + 1 - len(batches))]
            batches[number].append((s, part))
        return batches

    def _note_started(self, work: Work) -> None:
        for s in work.started:
            if s.new_count == 0 and not s.counted:
                s.counted = True
                self._stats.prompt_tokens_total += len(s.request.prompt)

    def _masks(self, batches: list[Items]) -> Masks:
        """Ask the constraints of all sequences that get a token now."""
        masks: dict[int, np.ndarray] = {}
        for items in batches:
            for s, part in items:
                constraint = s.request.constraint
                if constraint is None or not _ends(s, part):
                    continue
                try:
                    mask = constraint.mask()
                except Exception as error:
                    self._broken[s] = one_line(error, typed=True)
                    continue
                if mask is not None:
                    masks[part.row] = mask
        return masks

    def _read(self, items: Items, call: Call, answer: Answer) -> None:
        """Give every sequence its new token and its log-probabilities."""
        if not call.targets:
            return
        at = 0
        for s, part in items:
            if part.want == "none":
                continue
            first, at = at, at + (len(part.tokens) if part.want == "all" else 1)
            if s.result:
                continue  # ended by an earlier chunk of this call
            if is_drafted(part):
                self._read_checked(s, answer, first)
            else:
                self._read_last(s, part, answer, range(first, at))

    def _read_last(self, s: Sequence, part: Part, answer: Answer, places: range) -> None:
        """Give a sequence what follows a part's last token, and what is asked for of a prompt."""
        if part.want == "all" and answer.logprobs is not None:
            self._read_prompt(s, part, answer.logprobs[places.start : places.stop])
        if s.result is None and _ends(s, part):
            if s.request.max_new_tokens == 0:
                self._emit(s, "length")
            elif answer.tokens is not None:
                self._take_at(s, answer, places[-1])

    def _read_checked(self, s: Sequence, answer: Answer, at: int) -> None:
        """Give a sequence its new token, and the next one where it is the one that was drafted."""
        assert answer.tokens is not None
        self._stats.drafted_tokens_total += 1
        self._take_at(s, answer, at)
        if s.result is None and answer.tokens[at + 1] != REJECTED:
            self._stats.accepted_tokens_total += 1
            self._scheduler.accept_draft(s)
            self._take_at(s, answer, at + 1)

    def _read_prompt(self, s: Sequence, part: Part, logprobs: np.ndarray) -> None:
        prompt, wanted = s.request.prompt, s.request.prompt_logprobs or 0
        for i in range(len(part.tokens)):
            place = part.start + i + 1
            if place >= len(prompt) or place < s.request.prompt_logprobs_from:
                continue
            entry = _entry(prompt[place], logprobs[i], wanted)
            if not np.isfinite(entry.logprob):
                self.end(s, "error", error=POISONED)
                return
            s.prompt_logprobs.append(entry)

    def _take_at(self, s: Sequence, answer: Answer, at: int) -> None:
        assert answer.tokens is not None
        logprobs = answer.logprobs[at] if answer.logprobs is not None else None
        self._take(s, int(answer.tokens[at]), logprobs)

    def _take(self, s: Sequence, token: int, logprobs: np.ndarray | None) -> None:
        error = self._broken.pop(s, "") or (POISONED if token == NOT_FINITE else "")
        if token >= 0 and not error:
            error = self._append(s, token, logprobs)
        if error:
            self.end(s, "error", error=error)
        elif token == NOTHING_ALLOWED:
            self._emit(s, "stop")
        elif token in s.request.stop_ids:
            self._emit(s, "stop", token)
        elif (stop := s.read_text(token)) is not None:
            self._emit(s, "stop", stop)
        elif s.new_count >= s.request.max_new_tokens:
            self._emit(s, "length")
        elif s.on_output is not None:
            self._emit(s)

    def _append(self, s: Sequence, token: int, logprobs: np.ndarray | None) -> str:
        """Add a token; what went wrong with its constraint, or nothing."""
        self._stats.new_tokens_total += 1
        s.tokens.append(token)
        if s.request.logprobs is not None and logprobs is not None:
            s.logprobs.append(_entry(token, logprobs, s.request.logprobs))
        if s.request.constraint is not None:
            try:
                s.request.constraint.accept(token)
            except Exception as error:
                return one_line(error, typed=True)
        return ""

    def end(self, s: Sequence, reason: str, error: str = "") -> None:
        """End a sequence now, between or after its tokens."""
        self._emit(s, reason, error=error)

    def _emit(
        self,
        s: Sequence,
        reason: str | None = None,
        stopped_by: int | str | None = None,
        error: str = "",
    ) -> None:
        """Report what is new of a sequence, and let it go if there is a reason."""
        output = s.take_output(reason, stopped_by, error)
        if reason is not None:
            if self._keeps_experts and reason in ("stop", "length"):
                pages = self._scheduler.number_pages(s, s.pages)
                read = self._executor.runner.read_experts(pages, s.done)
                output = dataclasses.replace(output, experts=read)
            s.result = output
            name = f"finished_{reason}_total"
            setattr(self._stats, name, getattr(self._stats, name) + 1)
            self._stats.cached_tokens_total += s.cached
            self._scheduler.finish(s)
            self._ended.append(s)
        if s.on_output is None:
            return
        try:
            s.on_output(output)
        except Exception as raised:
            s.on_output = None
            if reason is None:
                self.end(s, "error", error=one_line(raised, typed=True))


def _ends(s: Sequence, part: Part) -> bool:
    """Whether nothing is known behind this part: its last token's logits choose one."""
    return part.start + len(part.tokens) == s.end


def _call(items: Items, decode: bool) -> Call:
    targets: list[int] = []
    picks, top = False, 0
    for s, part in items:
        request = s.request
        if part.want == "none":
            continue
        if is_drafted(part):
            targets += [-1, -1]
        elif part.want == "all":
            end = part.start + len(part.tokens)
            known = s.tokens[part.start + 1 : end + 1]
            targets += known + [-1] * (len(part.tokens) - len(known))
            top = max(top, 1, request.prompt_logprobs or 0)
        else:
            targets.append(-1)
        if is_drafted(part) or (_ends(s, part) and request.max_new_tokens):
            picks = True
            if request.logprobs is not None:
                top = max(top, 1, request.logprobs)
    return Call([part for _, part in items], decode, targets, picks, top)


def _entry(token: int, row: np.ndarray, wanted: int) -> TokenLogprob:
    """One row of `log_probabilities`."""
    if not wanted:
        return TokenLogprob(token, float(row[0]))
    width = len(row) // 2
    ids, values = row[1 + width : 1 + width + wanted], row[1 : 1 + wanted]
    top = tuple(zip(ids.astype(int).tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(row[0]), top)
