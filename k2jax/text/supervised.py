"""Conversations to learn from: which of their tokens the assistant said."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from k2jax.config import ConfigError
from k2jax.text.interface import Part, TokenizerLike
from k2jax.text.kimi_template import ASSISTANT, END, MIDDLE, THINK, to_ids
from k2jax.text.messages import checked, renumbered


def encode_supervised(
    tokenizer: TokenizerLike,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[int], np.ndarray]:
    """Token ids of a conversation, and which of them are learned.

    Learned are the bodies of the assistant's turns and the `<|im_end|>` that closes them. A turn is
    not learned where the template writes marks of thought but leaves out what was thought in it:
    the model would learn not to think.

    Args:
        tokenizer: with the template of the model.
        messages: see `k2jax.text.messages`.
        tools: what the assistant may call.

    Returns:
        The ids, which `k2jax.text.kimi_template.encode` gives too, and bool [ids].

    Raises:
        ConfigError: a message is malformed, nothing is learned, or the template is not Kimi's.
    """
    if tokenizer.template is None:
        raise ConfigError("this tokenizer has no chat template; conversations need one")
    turns = renumbered(checked(messages))
    said = [turn for turn in turns if turn["role"] == "assistant"]
    if not said:
        raise ConfigError("the conversation has no assistant's turn to learn")
    ids: list[int] = []
    learned: list[bool] = []
    replies = iter(said)
    for run, reply in _runs(tokenizer.template.parts(turns, tools, prompt=False)):
        part = to_ids(tokenizer, run)
        ids += part
        learned += [reply and not _thoughtless(next(replies, {}), run)] * len(part)
    if not any(learned):
        raise ConfigError(
            "nothing of the conversation would be learned: the template is not one of Kimi's, or"
            " leaves out what the assistant thought"
        )
    return ids, np.array(learned)


def _runs(parts: Sequence[Part]) -> Iterator[tuple[list[Part], bool]]:
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


def _thoughtless(turn: Mapping[str, Any], run: Sequence[Part]) -> bool:
    thought = turn.get("reasoning_content") or ""
    text = "".join(part.text for part in run)
    return thought not in text and THINK.text in text
