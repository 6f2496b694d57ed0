"""Conversations to learn from: which of their tokens the assistant wrote."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from k2jax.config import ConfigError
from k2jax.text.interface import Part, TokenizerLike
from k2jax.text.kimi_template import ASSISTANT, END, MIDDLE, THINK, to_ids
from k2jax.text.messages import check_messages, renumber_calls


def encode_supervised(
    tokenizer: TokenizerLike,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[int], np.ndarray]:
    """Token ids of a conversation, and which of them are learned.

    Learned are the bodies of the assistant's turns and the `<|im_end|>` that closes them. A turn is
    not learned where its `weight` is 0, or where the template writes marks of thought but leaves
    out what was thought in it: the model would learn not to think. So a conversation may teach
    nothing at all.

    Args:
        tokenizer: with the template of the model.
        messages: see `k2jax.text.messages`.
        tools: what the assistant may call.

    Returns:
        The ids, which `k2jax.text.kimi_template.encode` gives too, and bool [ids].

    Raises:
        ConfigError: a message is malformed, it has a thought and the template writes none, or the
            template is not Kimi's.
    """
    if tokenizer.template is None:
        raise ConfigError("this tokenizer has no chat template; conversations need one")
    turns = renumber_calls(check_messages(messages))
    answers = [(i, turn) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    runs = list(_split_runs(tokenizer.template.parts(turns, tools, prompt=False)))
    written = sum(is_reply for _, is_reply in runs)
    if written != len(answers):
        raise ConfigError(
            f"the template writes {written} of {len(answers)} assistant's turns as Kimi's do: it is"
            " not one of Kimi's, and what is to be learned cannot be seen"
        )
    ids: list[int] = []
    learned: list[bool] = []
    following = iter(answers)
    for run, is_reply in runs:
        run_ids = to_ids(tokenizer, run)
        ids += run_ids
        learned += [is_reply and _is_learned(*next(following), run)] * len(run_ids)
    return ids, np.array(learned, bool)


def _split_runs(parts: Sequence[Part]) -> Iterator[tuple[list[Part], bool]]:
    """Stretches of parts, and whether each is a reply; they meet at control tokens."""
    run: list[Part] = []
    head = reply = False
    for part in parts:
        run.append(part)
        if part == ASSISTANT:
            head = True
        elif (part == MIDDLE and head) or (part == END and reply):
            yield run, reply
            run, head, reply = [], False, not reply
    if run:
        yield run, reply


def _is_learned(place: int, turn: Mapping[str, Any], run: Sequence[Part]) -> bool:
    if not turn.get("weight", 1):
        return False
    thought = turn.get("reasoning_content", "")
    text = "".join(part.text for part in run)
    if thought not in text and THINK.text not in text:
        raise ConfigError(
            f"messages[{place}] has a thought, which this chat template never writes; take it out,"
            " or name a tokenizer's folder with a template that does"
        )
    return thought in text
