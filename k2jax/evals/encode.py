"""Token ids of what is scored, cut as lm-eval cuts them. Source: lm-eval 0.4.13, `TemplateLM`."""

from collections.abc import Callable, Iterator, Sequence

Ids = Sequence[int]
Row = tuple[list[int], list[int]]  # a context, and what follows it


def encode_pair(encode: Callable[[str], Ids], context: str, continuation: str) -> Row:
    """Return the ids of a context and of its continuation.

    White space at the end of the context goes to the continuation, and both are encoded as one
    text, so that tokens are those of the text as a model reads it.

    Args:
        encode: of a text, with whatever begins every text.
        context: not empty.
        continuation: what follows it.
    """
    kept = len(context.rstrip())
    if kept:
        context, continuation = context[:kept], context[kept:] + continuation
    before, whole = list(encode(context)), list(encode(context + continuation))
    return before, whole[len(before) :]


def cut_left(context: list[int], continuation: list[int], room: int) -> Row:
    """Drop the oldest tokens of what is too long; `room` is the model's context.

    The last token is not read, so `room + 1` tokens fit; one of them is context.
    """
    continuation = continuation[-room:]
    return context[-max(room + 1 - len(continuation), 1) :], continuation


def each_window(ids: Ids, first: int, room: int) -> Iterator[Row]:
    """Yield windows that score each of `ids` once.

    Args:
        ids: of a text.
        first: what goes before it, as [BOS].
        room: tokens that are read at once. All windows but the last are full; the last one begins
            early enough to be full too, and scores only what is new.
    """
    done, tokens = 0, [first, *ids]
    while done < len(ids):
        new = min(len(ids) - done, room)
        end = done + new + 1
        start = max(end - room - 1, 0) if done else 0
        yield tokens[start : done + 1], tokens[done + 1 : end]
        done += new
