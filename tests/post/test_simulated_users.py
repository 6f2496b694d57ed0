"""Scripted users talk to any agent: what they answer, and when they are done."""

import pytest

from k2jax.post.synthesis.users import ScriptedUser, asks_confirmation, is_consent

GOAL = {
    "core": "cancel the order ORD-1",
    "facts": {},
    "subjects": ["ORD-1"],
    "lookups": [],
    "confirm": True,
    "declines": False,
}
EMAIL = {**GOAL, "core": "change the email", "facts": {"new email": "a@b.c"}, "confirm": False}


def user(*goals, disclosure="upfront"):
    persona = {"name": "Ada", "manner": "plain", "disclosure": disclosure}
    return ScriptedUser({"persona": persona, "goals": list(goals), "seed": "1"})


@pytest.mark.parametrize(
    "text",
    [
        "Shall I go ahead?",
        "It costs $12.50. May I proceed?",
        "Is this correct?",
        "Please confirm that you want to cancel order ORD-1.",
        "This cannot be undone. Are you sure you want to delete it?",
    ],
)
def test_questions_for_consent_are_known(text):
    assert asks_confirmation(text)


@pytest.mark.parametrize(
    "text",
    [
        "I can confirm that it is cancelled. Is there anything else?",
        "What is the new email?",
        "Done.",
    ],
)
def test_other_texts_ask_for_no_consent(text):
    assert not asks_confirmation(text)


def test_consent_is_told_from_refusal():
    for text in ("Yes, no problem.", "ok do it", "Sure, go ahead. There is no rush"):
        assert is_consent(text), text
    for text in ("No, thank you.", "Oh no, please don't.", "I'd rather not, sorry", "hm", "nope"):
        assert not is_consent(text), text


def test_a_user_agrees_or_not_as_the_goal_says():
    for declines in (False, True):
        asked = user({**GOAL, "declines": declines})
        asked.open()
        assert is_consent(asked.reply("About to cancel ORD-1. Shall I go ahead?")) is not declines


def test_facts_are_told_when_they_are_asked_for_with_or_without_a_question_mark():
    for text in ("Which address?", "Please provide the new address.", "Shall I change it?"):
        asked = user(EMAIL, disclosure="asked")
        assert "a@b.c" not in asked.open()
        assert "a@b.c" in asked.reply(text)


def test_an_offer_of_more_help_is_answered_by_the_next_wish_or_the_end():
    asked = user(GOAL, EMAIL)
    asked.open()
    assert "change the email" in asked.reply("It is cancelled. Anything else I can do for you?")
    assert asked.reply("Done. Is there something else?") is None


def test_a_user_asked_for_what_nobody_knows_ends_the_talk_at_last():
    asked = user(GOAL)
    asked.open()
    answers = [asked.reply("What is your favourite colour?") for _ in range(4)]
    assert answers == ["I told you all I know."] * 3 + [None]
