"""Tokens and their log-probabilities as the OpenAI API writes them."""

from collections.abc import Sequence
from typing import Any

from k2jax.inference.request import TokenLogprob
from k2jax.text.incremental_decode import TextStream
from k2jax.text.interface import TokenizerLike

LEAST = -9999.0  # stands for minus infinity, which JSON has no number for


def name_token(tokenizer: TokenizerLike | None, id_: int) -> str:
    r"""The text of a token; bytes that are no whole characters as `bytes:\xe2\x82`."""
    if tokenizer is None or id_ >= tokenizer.vocab:
        return f"token_id:{id_}"
    content = tokenizer.decode_bytes([id_])
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def to_json(logprob: float) -> float:
    """A log-probability that JSON can write."""
    return max(logprob, LEAST)


def chat_entry(tokenizer: TokenizerLike, entry: TokenLogprob, top: int) -> dict[str, Any]:
    """One element of `logprobs.content` in a chat."""
    likeliest = [_chat_token(tokenizer, id_, logprob) for id_, logprob in entry.top[:top]]
    return {**_chat_token(tokenizer, entry.id, entry.logprob), "top_logprobs": likeliest}


def _chat_token(tokenizer: TokenizerLike, id_: int, logprob: float) -> dict[str, Any]:
    content = list(tokenizer.decode_bytes([id_])) if id_ < tokenizer.vocab else []
    return {"token": name_token(tokenizer, id_), "logprob": to_json(logprob), "bytes": content}


def prompt_entries(
    tokenizer: TokenizerLike | None, entries: Sequence[TokenLogprob | None], top: int
) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` as open-source servers have them: at each place an object by token id."""
    out: list[dict[str, Any] | None] = []
    for entry in entries:
        if entry is None:
            out.append(None)
            continue
        ranked = list(entry.top[:top])
        ranks = {id_: rank for rank, (id_, _) in enumerate(ranked, 1)}
        pairs = {entry.id: entry.logprob} | dict(ranked)
        out.append(
            {
                str(id_): {
                    "logprob": to_json(logprob),
                    "rank": ranks.get(id_),
                    "decoded_token": name_token(tokenizer, id_),
                }
                for id_, logprob in pairs.items()
            }
        )
    return out


class CompletionLogprobs:
    """`logprobs` of a completion: four lists that grow together.

    Tokens are named by their text, and where each begins in the answer's text is counted.
    """

    def __init__(self, tokenizer: TokenizerLike | None, top: int):
        self._tokenizer, self._top = tokenizer, top
        self._text = TextStream(tokenizer) if tokenizer else None
        self._offset = 0

    def add(
        self, ids: Sequence[int], entries: Sequence[TokenLogprob | None], unwritten: int = 0
    ) -> dict[str, list[Any]]:
        """The next tokens.

        Args:
            ids: of them.
            entries: one each; None for the first of a prompt.
            unwritten: how many at the start are not in the answer's text.
        """
        out: dict[str, list[Any]] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for place, (id_, entry) in enumerate(zip(ids, entries, strict=True)):
            out["text_offset"].append(self._offset)
            out["tokens"].append(name_token(self._tokenizer, id_))
            if self._text and self._tokenizer and id_ < self._tokenizer.vocab:
                length = len(self._text.feed([id_]))
                self._offset += 0 if place < unwritten else length
            likeliest = None
            if entry is not None:
                pairs = {id_: entry.logprob} | dict(entry.top[: self._top])
                likeliest = {
                    name_token(self._tokenizer, other): to_json(logprob)
                    for other, logprob in pairs.items()
                }
            out["token_logprobs"].append(None if entry is None else to_json(entry.logprob))
            out["top_logprobs"].append(likeliest)
        return out
