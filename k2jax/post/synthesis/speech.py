"""Values in words, and manners of speaking: what makes two users ask for one thing differently."""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from k2jax.post.synthesis.world_file import Entity, Field

MANNERS: dict[str, dict[str, list[str]]] = {
    "terse": {
        "ask": ["{core}.", "please {core}.", "need you to {core}."],
        "fact": ["{facts}.", "{facts}"],
        "yes": ["yes", "ok do it", "confirmed"],
        "no": ["no, leave it", "no. changed my mind", "don't"],
        "next": ["also: {core}.", "next: {core}."],
        "pity": ["too bad. then {core}.", "ok. {core} instead."],
    },
    "chatty": {
        "ask": [
            "Hi there! Hope your day is going well. I was wondering whether you could {core}? That"
            " would be lovely.",
            "Hello again, it's {name}. So, long story short, I'd like you to {core}. No rush!",
        ],
        "fact": ["Oh sure, let me see... {facts}. I had it written down somewhere!"],
        "yes": ["Yes, that sounds perfect, please go ahead!", "Yes please, do it, and thank you!"],
        "no": ["Hmm, you know what, no. I talked it over and would rather leave it as it is."],
        "next": ["Wonderful! While I have you here, could you also {core}?"],
        "pity": ["Oh, what a pity! Never mind. Could you {core}, then?"],
    },
    "formal": {
        "ask": [
            "Good afternoon. My name is {name}. I would like to ask you to {core}.",
            "Dear team, kindly {core}. Regards, {name}",
        ],
        "fact": ["Certainly. {facts}."],
        "yes": ["Yes, I confirm. Please proceed.", "That is correct; you may proceed."],
        "no": ["No, thank you. On reflection I do not wish to proceed."],
        "next": ["I appreciate it. Furthermore, please {core}."],
        "pity": ["That is regrettable, but I understand. In that case, please {core}."],
    },
    "hurried": {
        "ask": ["Quick one, I'm on the run: {core} asap?", "no time, pls {core} right now"],
        "fact": ["{facts}, hurry please"],
        "yes": ["yes yes go", "yep, now please"],
        "no": ["no wait, don't. skip it", "no, cancel that idea"],
        "next": ["good. and {core}, quickly", "ok now {core}"],
        "pity": ["ugh. fine. then {core}"],
    },
    "anxious": {
        "ask": [
            "Sorry to bother you, I'm a little worried I did something wrong. Could you {core}?",
            "I hope this is the right place... I really need someone to {core}.",
        ],
        "fact": ["I think it is this: {facts}. I hope that helps."],
        "yes": ["Yes, please, I'm sure. Go ahead.", "Okay, yes. You may do that."],
        "no": ["Oh no, then please don't. I'd rather not risk it."],
        "next": ["Phew. One more thing, if I may: could you {core}?"],
        "pity": ["Oh dear. I hope that is no problem. Could you {core} at least?"],
    },
    "plain": {
        "ask": ["Could you {core}?", "Please {core}.", "Hello, I want you to {core}."],
        "fact": ["{facts}.", "It's {facts}."],
        "yes": ["Yes, please go ahead.", "Yes, that's right.", "Go ahead."],
        "no": ["No, please leave everything as it is.", "No, I changed my mind."],
        "next": ["Thanks. Now please {core}.", "And could you {core}?"],
        "pity": ["I see. Then please {core}.", "That's a pity. Could you {core}?"],
    },
}


def speak(value: Any, field: Field | None = None) -> str:
    """A value as people say it; money with its sign."""
    if field is not None and field.kind == "money" and isinstance(value, int | float):
        return f"${value:,.2f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        inner = {one.name: one for one in field.inner} if field else {}
        shown = [
            f"{name.replace('_', ' ')} {speak(v, inner.get(name))}" for name, v in value.items()
        ]
        return ", ".join(shown)
    if isinstance(value, list):
        return join([str(item) for item in value]) or "none"
    return "none" if value is None else str(value)


def spellings(value: Any, field: Field | None = None) -> list[str]:
    """How a value may be written in an answer that names it."""
    if isinstance(value, bool):
        return ["yes", "true", "enabled", "is on"] if value else ["no", "not", "false", "off"]
    if isinstance(value, int | float):
        return list(dict.fromkeys([f"{value:.2f}", f"{value:g}", str(value)]))
    return [speak(value, field)]


def is_written(spelled: Sequence[str], text: str) -> bool:
    """Whether a text has one of the spellings, as a word of its own; case and commas aside."""
    plain = flatten(text)
    return any(
        re.search(rf"(?<![\w.]){re.escape(flatten(one))}(?![\w])", plain) is not None
        for one in spelled
    )


def flatten(text: str) -> str:
    """Lower case, one space, no separators of thousands, straight quotes."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.casefold().replace("\u2019", "'"))
    return " ".join(text.replace("*", "").replace("`", "").split())


def join(items: Sequence[str]) -> str:
    """A list in words."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def name_record(entity: Entity, record: Mapping[str, Any], by_id: bool) -> str:
    """What people call a record: its kind, and its id or its name."""
    kind = entity.name.replace("_", " ")
    return f"{kind} {record['id']}" if by_id else f'{kind} "{record.get(entity.key)}"'


def in_manner(manner: str, kind: str, rng: random.Random, **parts: str) -> str:
    """A message in a manner of speaking; kinds are the keys of `MANNERS["plain"]`."""
    return rng.choice(MANNERS[manner][kind]).format(**parts)
