"""Simulated users: who they are, what they know, when they tell it."""

import random
import re
from collections.abc import Mapping
from typing import Any

from k2jax.post.synthesis.speech import MANNERS, flatten, in_manner, is_written
from k2jax.post.synthesis.words import draw_word

DISCLOSURES = ("upfront", "asked", "all at once")
ASKS_CONFIRMATION = re.compile(
    r"go ahead|proceed|confirm|shall i|should i|do you want me|would you like me|are you sure|may i"
    r"|is (this|that) (ok|okay|right|correct)"
)
QUESTION = re.compile(r"(?:[^.!?\n]|\.(?=\d))*\?")  # a sentence; points in numbers do not end it
TELLS_TO_CONFIRM = re.compile(r"please confirm (that|whether|if)|(reply|answer|say) \W?yes")
ASKS = re.compile(r"\b(provide|tell me|let me know|specify|need to know|i need)\b")
OFFERS = re.compile(r"(anything|something) (else|more)|further (help|assist)|assist you further")
YES = re.compile(
    r"\b(yes|yep|yeah|ok|okay|sure|confirm|confirmed|go ahead|proceed|please do|do it|correct"
    r"|right)\b"
)
NO = re.compile(
    r"^(oh,? |well,? |sorry,? )?(no|nope)\b|\bno[.,!]|\bdon't\b|\bdo not\b|rather (not|leave)"
    r"|changed my mind|skip it|not wish|\bstop\b"
)
REFUSED = re.compile(r"\b(could not|cannot|can't|couldn't|unable|not possible)\b")
PATIENCE = 3  # questions without an answer that a user takes

JOBS = (
    "a nurse on night shifts", "a retired teacher", "a student with two jobs", "a chef", "a pilot",
    "a parent of three", "a freelance designer", "a farmer", "an accountant", "a bus driver",
    "a violinist", "a doctoral student", "a shop owner", "a carpenter", "a journalist",
)  # fmt: skip
MOODS = {
    "terse": "writes as few words as possible",
    "chatty": "is friendly and tells more than is needed",
    "formal": "writes politely and in full sentences",
    "hurried": "has no time and shows it",
    "anxious": "worries about mistakes and wants to be reassured",
    "plain": "says plainly what is wanted",
}
POLICIES = {
    "upfront": "tells all details of one wish at once, and the next wish when it is done",
    "asked": "names a wish first, and gives details only when asked for them",
    "all at once": "names all wishes with all details in the first message",
}

Persona = dict[str, str]


def draw_persona(rng: random.Random) -> Persona:
    """Draw who asks: name, manner of speaking, and when they tell what they know."""
    name, manner = draw_word("person", rng), rng.choice(sorted(MANNERS))
    disclosure = rng.choice(DISCLOSURES)
    text = f"{name}, {rng.choice(JOBS)}, {MOODS[manner]}; {POLICIES[disclosure]}."
    return {"name": name, "manner": manner, "disclosure": disclosure, "text": text}


def is_consent(text: str) -> bool:
    """Whether a user's answer to a question for confirmation agrees."""
    plain = flatten(text)
    return bool(YES.search(plain)) and not NO.search(plain)


def asks_confirmation(text: str) -> bool:
    """Whether an agent's text asks the user to agree to something."""
    plain = flatten(text)
    asked = any(ASKS_CONFIRMATION.search(sentence) for sentence in QUESTION.findall(plain))
    return asked or bool(TELLS_TO_CONFIRM.search(plain))


class ScriptedUser:
    """Plays a task's user: asks, answers what it is asked, agrees or not, ends.

    It knows `goals` and nothing of the world. Whatever the agent, it answers its questions: with
    what it has not told yet, else with consent or refusal.
    """

    name = "scripted"

    def __init__(self, task: Mapping[str, Any]):
        """Play the user of a task."""
        self.persona, self.goals = task["persona"], task["goals"]
        self.rng = random.Random(f"user {task['seed']}")
        self.together = self.persona["disclosure"] == "all at once"
        self.current = 0
        self.asked: set[int] = set()  # goals that were confirmed or declined
        self.untold: dict[str, str] = {}
        self.idle = 0

    def open(self) -> str:
        """The first message."""
        if self.together:
            return self._say("ask", core="; and then ".join(map(self._wish, self.goals)))
        return self._ask("ask")

    def reply(self, text: str) -> str | None:
        """Answer the agent; None: the conversation is over."""
        if self._is_asked(text):
            answer = self._answer(text)
            if answer is None:
                self.idle += 1
                return None if self.idle > PATIENCE else "I told you all I know."
            return answer
        if self.together or self.current + 1 >= len(self.goals):
            return None
        self.current += 1
        return self._ask("pity" if REFUSED.search(flatten(text)) else "next")

    def _is_asked(self, text: str) -> bool:
        """Whether the agent waits for an answer; an offer of more help is none."""
        plain = flatten(text)
        if self.untold:
            return "?" in plain or bool(ASKS.search(plain))
        return asks_confirmation(text) or ("?" in plain and not OFFERS.search(plain))

    def _answer(self, text: str) -> str | None:
        if self.untold:
            facts, self.untold = self.untold, {}
            return self._say("fact", facts=", ".join(f"{x}: {y}" for x, y in facts.items()))
        if not asks_confirmation(text):
            return None
        goal = self._meant(text)
        return self._say("no" if goal["declines"] else "yes")

    def _meant(self, text: str) -> Mapping[str, Any]:
        """The goal that a question for confirmation is about."""
        if not self.together:
            return self.goals[self.current]
        waiting = [
            i for i, goal in enumerate(self.goals) if goal["confirm"] and i not in self.asked
        ]
        waiting = waiting or [len(self.goals) - 1]
        for i in waiting:
            goal = self.goals[i]
            names = [*goal["subjects"], *(query for _, query in goal["lookups"])]
            if goal["core"] in text or is_written(names, text):
                break
        else:
            i = waiting[0]
        self.asked.add(i)
        return self.goals[i]

    def _ask(self, kind: str) -> str:
        goal = self.goals[self.current]
        if self.persona["disclosure"] == "asked":
            self.untold = dict(goal["facts"])
            return self._say(kind, core=goal["core"])
        return self._say(kind, core=self._wish(goal))

    def _wish(self, goal: Mapping[str, Any]) -> str:
        facts = ", ".join(f"{label}: {value}" for label, value in goal["facts"].items())
        return f"{goal['core']} ({facts})" if facts else goal["core"]

    def _say(self, kind: str, **parts: str) -> str:
        return in_manner(self.persona["manner"], kind, self.rng, name=self.persona["name"], **parts)
