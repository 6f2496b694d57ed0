"""lm-eval's tasks, answered by our engine: the package's own model class, in this process.

Importing this needs the extra `eval`. Token ids are cut as lm-eval's `hf` model cuts them, so that
both agree; as with that model [BOS] goes before texts only where `add_bos` says so.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from k2jax.config import ConfigError
from k2jax.evals.encode import cut_left, each_window, encode_pair
from k2jax.evals.ledger_parts import derive_from, describe_continuation, describe_scored, hash_ids
from k2jax.evals.scorer import Scorer
from k2jax.inference.request import Request, Result, Sampling
from k2jax.text.kimi_template import encode
from k2jax.text.messages import check_messages

DEFAULT_NEW = 256  # tokens of an answer whose task does not say, as in lm-eval
Part = dict[str, Any]  # what a ledger has of a request
Job = tuple[Request, Callable[[Result], None]]
KNOWN = ("do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k", "min_p")


class HarnessModel(TemplateLM):
    """A model of lm-eval.

    Attributes:
        parts: answers by task, document, number of the request, and its repeat; those that are
            there already are not computed again.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        add_bos: bool = False,
        seed: int = 0,
        parts: Mapping[str, Part] | None = None,
        keep: Callable[[str, Part], None] | None = None,
    ):
        """Use a scorer.

        Args:
            scorer: with the model.
            add_bos: put [BOS] before texts.
            seed: of draws.
            parts: answers that are known, as `keep` was called with them.
            keep: called with each new answer.
        """
        super().__init__()
        self._scorer, self._words = scorer, scorer.tokenizer
        self.max_length = scorer.context
        self.add_bos, self.seed = add_bos, seed
        self.parts: dict[str, Part] = dict(parts or {})
        self._keep = keep

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document."""
        return self._words.eos

    @property
    def prefix_token_id(self) -> int:
        """The id before a text that has no context."""
        return self._words.bos

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return "k2jax"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text."""
        begins = self.add_bos if add_special_tokens is None else add_special_tokens
        return [*[self._words.bos] * begins, *self._words.encode(string)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_pair(self.tok_encode, context, continuation)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        names = name_requests(requests)
        rows = []
        for request in requests:
            context, continuation = request.args
            if context:
                rows.append(self._encode_pair(context, continuation))
                continue
            ids = self.tok_encode(continuation, add_special_tokens=False)
            first = [self.prefix_token_id]
            rows.append((ids[:1], ids[1:]) if ids[:1] == first else (first, ids))
        return self._score(names, rows)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [(context, continuation) for _, context, continuation in requests]
        return self._score([""] * len(rows), rows)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text."""
        names, rows, owners = [], [], []
        for owner, (name, request) in enumerate(
            zip(name_requests(requests), requests, strict=True)
        ):
            ids = self.tok_encode(request.args[0])
            for number, row in enumerate(each_window(ids, self.prefix_token_id, self.max_length)):
                names.append(f"{name}/{number}")
                rows.append(row)
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(names, rows), strict=True):
            totals[owner] += logprob
        return totals

    def _score(
        self, names: Sequence[str], rows: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        found: dict[int, Part] = {}

        def asked() -> Iterator[Job]:
            for at, (name, row) in enumerate(zip(names, rows, strict=True)):
                context, rest = cut_left(*row, self.max_length)
                known = self.parts.get(name) if name else None
                if known is not None and known["prompt"] == hash_ids(context):
                    found[at] = known
                    continue
                request = Request(
                    (*context, *rest), 0, prompt_logprobs=1, prompt_logprobs_from=len(context)
                )
                yield request, functools.partial(end, at, context)

        def end(at: int, context: list[int], result: Result) -> None:
            found[at] = part = describe_scored(context, result)
            self._note(names[at], part)

        self._scorer.run(asked())
        return [
            (float(sum(found[at]["logprobs"])), found[at]["is_greedy"]) for at in range(len(rows))
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each text, up to the first of its stops."""
        names, found = name_requests(requests), {}

        def asked() -> Iterator[Job]:
            for at, (name, instance) in enumerate(zip(names, requests, strict=True)):
                request = self._make_request(name, *instance.args)
                known = self.parts.get(name)
                if known is not None and known["prompt"] == hash_ids(request.prompt):
                    found[at] = known
                    continue
                yield request, functools.partial(end, at, request)

        def end(at: int, request: Request, result: Result) -> None:
            found[at] = part = describe_continuation(request.prompt, result)
            self._note(names[at], part)

        self._scorer.run(asked())
        return [found[at]["text"] for at in range(len(requests))]

    def _make_request(self, name: str, context: str, kinds: Mapping[str, Any]) -> Request:
        kinds = normalize_gen_kwargs(dict(kinds), DEFAULT_NEW)
        if unknown := [key for key in kinds if key not in KNOWN]:
            raise ConfigError(f"generation_kwargs has {unknown[0]!r}, which is not known here")
        new = kinds["max_gen_toks"]
        if new >= self.max_length:
            raise ConfigError(f"max_gen_toks is {new}, the context is {self.max_length} tokens")
        until = kinds.get("until") or []
        sampling = Sampling(
            kinds["temperature"],
            seed=derive_from(self.seed, name),
            **{key: kinds[key] for key in ("top_p", "top_k", "min_p") if key in kinds},
        )
        prompt = self.tok_encode(context)[-(self.max_length - new) :] or [self.prefix_token_id]
        stops = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        return Request(
            tuple(prompt), new, sampling, frozenset(self._words.stops), stops, logprobs=0
        )

    def _note(self, name: str, part: Part) -> None:
        if name:
            self.parts[name] = part
            if self._keep is not None:
                self._keep(name, part)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Name the template, for lm-eval's records."""
        return type(self._words.template).__name__ if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation as the model reads it."""
        ids = encode(self._words, check_messages(chat_history), prompt=add_generation_prompt)
        return self._words.decode(ids)


def name_requests(requests: Sequence[Instance]) -> list[str]:
    """Name each request of a task by its document, its place and kind there, and its repeat."""
    seen: dict[str, int] = {}
    names = []
    for request in requests:
        name = f"{request.task_name}/{request.doc_id}/{request.idx}.{request.request_type}"
        repeat = seen[name] = seen.get(name, -1) + 1
        names.append(f"{name}/{repeat}")
    return names
