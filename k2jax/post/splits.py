"""Which tasks are held out: by a hash of their names, whatever their order and number."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from k2jax.post.toy_tasks import is_held_out

T = TypeVar("T")


def split_tasks(tasks: Sequence[T], name: Callable[[T], str]) -> dict[str, list[T]]:
    """Tasks by "train" and "heldout", in their order."""
    out: dict[str, list[T]] = {"train": [], "heldout": []}
    for task in tasks:
        out["heldout" if is_held_out(name(task)) else "train"].append(task)
    return out
