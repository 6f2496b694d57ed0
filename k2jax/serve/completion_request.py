"""`/v1/completions`: texts or token ids to continue, and to score."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from k2jax.inference.request import TOP_LOGPROBS, Request, derive_seed
from k2jax.serve import sampling_fields as shared
from k2jax.serve.ask import CompletionAsk
from k2jax.serve.body import Body, check_ids
from k2jax.serve.refusal import Refusal
from k2jax.serve.service import ModelCard, Service

LENGTH = 16  # new tokens where a request does not say; as the OpenAI API
FIELDS = (*shared.SHARED, "prompt", "echo", "best_of", "add_special_tokens")
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **shared.UNSUPPORTED,
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
}


def read_completion(content: Mapping[str, Any], service: Service) -> CompletionAsk:
    """Read a request's body.

    Args:
        content: its JSON object.
        service: whose model continues the prompts.

    Raises:
        Refusal: a field is wrong.
    """
    body = Body(content, FIELDS, UNSUPPORTED)
    card = service.card
    card.check_name(body.value("model"))
    streaming, echo = shared.read_streaming(body), body.flag("echo")
    texts, prompts, begun = _read_prompts(body, card, echo)
    choices = body.integer("n", 1, 1, shared.MOST_CHOICES)
    if body.integer("best_of", choices, 1, shared.MOST_CHOICES) != choices:
        body.refuse("best_of", "must be n: all that is generated is returned")
    if len(prompts) * choices > service.limits.sequences:
        body.refuse("prompt", f"and n ask for more than {service.limits.sequences} sequences")
    stops = card.tokenizer.stops if card.tokenizer else ()
    ends = shared.read_ends(body, stops, card.vocab)
    sampling = shared.read_sampling(body, service.defaults.fix(False), card.vocab)
    top = body.integer("logprobs", 0, 0, TOP_LOGPROBS) if "logprobs" in body else None
    scored = shared.read_prompt_logprobs(body, streaming)
    echoed = top if echo else None
    wanted = [count for count in (scored, echoed) if count is not None]
    requests = []
    for prompt in prompts:
        room = card.context - len(prompt)
        length = shared.read_length(body, LENGTH, room, 0 if echo else 1, "prompt")
        request = Request(
            prompt,
            length,
            stop_ids=ends.ids,
            stop=ends.texts,
            logprobs=top,
            # An echo without new tokens is what a prompt's scores are, wanted or not.
            prompt_logprobs=max(wanted) if wanted else None if length else 0,
        )
        for number in range(choices):
            seed = derive_seed(sampling.seed, number)
            drawn = dataclasses.replace(sampling, seed=seed)
            requests.append(dataclasses.replace(request, sampling=drawn))
    echoes = tuple(text for text in texts for _ in range(choices)) if echo else None
    count = sum(map(len, prompts))
    return CompletionAsk(tuple(requests), streaming, top, scored is not None, count, echoes, begun)


def _read_prompts(
    body: Body, card: ModelCard, echo: bool
) -> tuple[list[str], list[tuple[int, ...]], int]:
    """Texts of the prompts (of ids, if they are to be echoed), their ids, [BOS] before them."""
    prompt = body.value("prompt")
    begins = body.flag("add_special_tokens", True)
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        body.refuse("prompt", "must be a text, a list of texts, of token ids, or of lists of ids")
    if all(isinstance(text, str) for text in prompt):
        tokenizer = card.need_tokenizer()
        first = (tokenizer.bos,) if begins else ()
        encoded = [(*first, *ids) for ids in tokenizer.encode_batch(prompt)]
        if () in encoded:
            body.refuse("prompt", "is empty, and add_special_tokens is false")
        return prompt, encoded, len(first)
    listed = [prompt] if isinstance(prompt[0], int) else prompt
    ids = [check_ids(row, card.vocab, "prompt") for row in listed]
    if () in ids:
        raise Refusal("prompt has an empty list of token ids", "prompt", code="invalid_value")
    texts = [card.need_tokenizer().decode(row) for row in ids] if echo else [""] * len(ids)
    return texts, ids, 0
