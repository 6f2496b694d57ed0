"""The OpenAI Python client against the server."""

import json

import openai
import pytest
from serving import NAME, say_what_user_says, section, serving, tool, user, wait_until

WEATHER = tool("get_weather", city={"type": "string"})
PARIS = '{"city": "Paris"}'


def ask(server, text, **fields):
    return server.client.chat.completions.create(model=NAME, messages=user(text), **fields)


def test_a_chat_is_answered(server):
    answer = ask(server, "Hello, w\u00f6rld")
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello, w\u00f6rld", "stop")
    assert choice.message.role == "assistant" and choice.message.tool_calls is None
    usage = answer.usage
    assert usage.completion_tokens == len("Hello, w\u00f6rld".encode()) + 1  # and the end
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    assert answer.model == NAME and answer.system_fingerprint == "k2jax-test"


def test_a_stream_says_the_same_in_pieces(server):
    chunks = list(ask(server, "\u6f22\u5b57 ok", stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == "\u6f22\u5b57 ok" and "\ufffd" not in "".join(deltas)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    # Kimi's API reports usage in the last choice, asked for or not.
    assert chunks[-1].choices[0].usage["completion_tokens"] == 10


def test_usage_ends_a_stream_if_it_is_asked_for(server):
    chunks = list(ask(server, "ab", stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_round_trip_of_tools(server):
    said = "I look." + section(("functions.get_weather:0", PARIS))
    first = ask(server, said, tools=[WEATHER])
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert (call.id, call.function.name) == ("functions.get_weather:0", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    messages = [
        *user(said),
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "15C"},
        *user(section(("functions.get_weather:1", PARIS))),
    ]
    second = server.client.chat.completions.create(model=NAME, messages=messages, tools=[WEATHER])
    # The index counts all calls of the conversation.
    assert second.choices[0].message.tool_calls[0].id == "functions.get_weather:1"
    assert second.choices[0].message.content is None


def test_calls_are_streamed_in_pieces():
    said = section(("functions.get_weather:0", PARIS), ("functions.get_weather:1", "{}"))
    # Slower than the server's pause, so that the pieces do not come together.
    with serving(say_what_user_says, engine={"seconds": 0.02}) as server:
        chunks = list(ask(server, said, tools=[WEATHER], stream=True))
    pieces = [p for c in chunks for p in c.choices[0].delta.tool_calls or ()]
    named = [p for p in pieces if p.id]
    assert [p.function.name for p in named] == ["get_weather"] * 2
    assert [p.id for p in named] == ["functions.get_weather:0", "functions.get_weather:1"]
    first = [p.function.arguments for p in pieces if p.index == 0]
    assert "".join(first) == PARIS and len(first) > 5
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_thoughts_have_both_names(server):
    message = ask(server, "<think>hm</think>yes").choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == ("hm", "hm", "yes")
    chunks = list(ask(server, "<think>hm</think>yes", stream=True))
    thoughts = [getattr(c.choices[0].delta, "reasoning_content", None) for c in chunks]
    assert "".join(filter(None, thoughts)) == "hm"


def test_several_choices_have_seeds_of_their_own(server):
    answer = ask(server, "ab", n=3, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert {c.message.content for c in answer.choices} == {"ab"}
    seeds = [request.sampling.seed for request in server.engine.requests[-3:]]
    assert seeds[0] == 5 and len(set(seeds)) == 3
    assert answer.usage.completion_tokens == 9


def test_logprobs_are_of_every_token(server):
    choice = ask(server, "a\u00e9", logprobs=True, top_logprobs=2).choices[0]
    entries = choice.logprobs.content
    assert [entry.token for entry in entries] == ["a", r"bytes:\xc3", r"bytes:\xa9", "<|im_end|>"]
    assert bytes(entries[1].bytes + entries[2].bytes).decode() == "\u00e9"
    assert [top.token for top in entries[0].top_logprobs] == ["a", "b"]
    chunks = list(ask(server, "a\u00e9", logprobs=True, top_logprobs=2, stream=True))
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == entries


def test_a_stop_text_ends_the_content(server):
    choice = ask(server, "<think>END</think>abENDcd", stop=["END"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("ab", "stop")
    assert choice.message.reasoning_content == "END"


def test_the_length_is_a_limit(server):
    for field in ("max_tokens", "max_completion_tokens"):
        answer = ask(server, "abcdef", **{field: 3})
        assert answer.choices[0].message.content == "abc"
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 3


def test_errors_have_the_classes_of_the_client(server):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, "x", temperature=3)
    assert caught.value.param == "temperature" and "at most 2" in caught.value.message
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.chat.completions.create(model="other", messages=user())
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        server.client.embeddings.create(model=NAME, input="x")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, "x", max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"


def test_models_are_listed(server):
    assert [model.id for model in server.client.models.list()] == [NAME]
    assert server.client.models.retrieve(NAME).id == NAME


def test_a_stream_that_is_closed_ends_its_sequence():
    with serving(lambda request: "a" * 4000, engine={"seconds": 0.005}) as server:
        stream = ask(server, "x", stream=True)
        next(iter(stream))
        stream.close()
        wait_until(lambda: server.engine.stats().running == 0)
        assert server.engine.aborted == [1] and server.engine.new_tokens < 1000


def test_completions_of_texts_and_ids(server):
    create = server.client.completions.create
    assert create(model=NAME, prompt="ab", max_tokens=100).choices[0].text == "[BOS]ab"
    plain = {"add_special_tokens": False}
    several = create(model=NAME, prompt=["a", "b"], extra_body=plain)
    assert [c.text for c in several.choices] == ["a", "b"]
    assert create(model=NAME, prompt=[97, 98]).choices[0].text == "ab"
    assert [c.text for c in create(model=NAME, prompt=[[97], [98]], n=2).choices] == [*"aabb"]
    streamed = create(model=NAME, prompt=[97, 98], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "ab"
    assert create(model=NAME, prompt=[*b"ab.cd"], stop=".").choices[0].text == "ab"
