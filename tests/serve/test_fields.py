"""A wrong field is refused by its name, as the OpenAI API does; unknown ones are passed over."""

import pytest
from serving import NAME, serving, tool, user

from k2jax.serve.body import Body
from k2jax.serve.chat_request import FIELDS, read_variables

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
F = tool("f")


def post(server, path, **fields):
    answer = server.http.post(path, json=fields)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "usr", "content": ""}]}, "messages[0]", "did you mean 'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "needs a 'content'"),
        ({"messages": user("a" * 5000)}, "messages", "more than fit; shorten it"),
        ({"max_tokens": 5000}, "max_tokens", "at most"),
        ({"max_tokens": 1e300}, "max_tokens", "too large"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]", "tool_call_id"),
        ({"temperature": -0.1}, "temperature", "at least 0"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": True}, "n", "integer"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "differs"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": [1]}, "stop", "text"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"97": 101}}, "logit_bias", "at most 100"),
        ({"top_logprobs": 2}, "top_logprobs", "needs 'logprobs'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs 'stream'"),
        ({"stop_token_ids": [999]}, "stop_token_ids", "0..511"),
        ({"tools": [{}]}, "tools[0]", "function"),
        ({"tools": [F, F]}, "tools[1].function.name", "twice"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "white space"),
        ({"tools": [{**F, "type": "builtin"}]}, "tools[0]", "'function'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [F], "tool_choice": "always"}, "tool_choice", "always"),
        (
            {"tools": [F], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "'g'",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
        ({"thinking": {"type": "on"}}, "thinking", "enabled"),
        ({"thinking": {"type": "enabled", "keep": "some"}}, "thinking", "'all'"),
        (
            {"thinking": True, "chat_template_kwargs": {"thinking": False}},
            "chat_template_kwargs",
            "another 'thinking'",
        ),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"min_tokens": 5}, "min_tokens", "not supported"),
        ({"model": 5}, "model", "text"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not streamed"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(server, fields, param, words):
    status, body = post(server, CHAT, **{"messages": user(), **fields})
    error = body["error"]
    assert (status, error["param"]) == (400, param) and words in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) >= {"code", "param"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a" * 5000}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(server, fields, param):
    status, body = post(server, TEXT, **fields)
    assert (status, body["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b"\xff", 400),
        (b'{"temperature": NaN}', 400),
        (b"[" * 100_000, 400),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(server, content, status):
    answer = server.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("verb", "path", "status", "words"),
    [
        ("GET", CHAT, 405, "takes POST, not GET"),
        ("DELETE", "/v1/models", 405, "not DELETE"),
        ("POST", "/v1/chat/completion", 404, "did you mean '/v1/chat/completions'"),
        ("POST", CHAT + "/", 404, "did you mean '/v1/chat/completions'"),
        ("POST", "/v1/embeddings", 404, "there is no '/v1/embeddings'"),
    ],
)
def test_a_wrong_path_or_method_is_an_error_of_the_api(server, verb, path, status, words):
    answer = server.http.request(verb, path)
    assert answer.status_code == status and words in answer.json()["error"]["message"]


def test_a_compressed_body_is_refused(server):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = server.http.post(CHAT, content=b"{}", headers=headers)
    assert answer.status_code == 415 and "gzip" in answer.json()["error"]["message"]


def test_unknown_fields_and_nulls_are_passed_over(server):
    fields = {"user": "me", "metadata": {}, "store": False, "x_vendor": 1, "temperature": None}
    status, body = post(server, CHAT, messages=user("ok"), **fields)
    assert status == 200 and body["choices"][0]["message"]["content"] == "ok"
    assert server.engine.requests[-1].sampling.temperature == 1


def test_every_setting_of_sampling_reaches_the_engine(server):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "seed": 7,
        "logit_bias": {"97": -100},
    }
    assert post(server, CHAT, messages=user("ok"), **fields)[0] == 200
    sampling = server.engine.requests[-1].sampling
    for name, value in fields.items():
        wanted = {97: -100.0} if name == "logit_bias" else value
        assert getattr(sampling, name) == wanted
    post(server, CHAT, messages=user("ok"), top_k=-1, ignore_eos=True, stop_token_ids=[97])
    request = server.engine.requests[-1]
    assert request.sampling.top_k == 0 and request.stop_ids == {97}


def test_a_stop_id_of_the_request_is_no_content(server):
    _, body = post(server, CHAT, messages=user("xyaz"), stop_token_ids=[97])
    choice = body["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("xy", "stop")


def test_foreign_ids_of_calls_are_renumbered_in_the_prompt(server):
    call = {"id": "call_x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = [
        *user("a"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_x", "content": "1"},
        *user("b"),
    ]
    assert post(server, CHAT, messages=talk, tools=[F])[0] == 200
    prompt = server.service.card.tokenizer.decode(server.engine.requests[-1].prompt)
    assert "functions.f:0" in prompt and "call_x" not in prompt


def test_tools_of_a_system_message_may_be_called(server):
    talk = [{"role": "system", "content": "s", "tools": [F]}, *user("ok")]
    named = {"type": "function", "function": {"name": "f"}}
    assert post(server, CHAT, messages=talk, tool_choice=named)[0] == 200
    status, body = post(server, CHAT, messages=talk, tools=[F])
    assert status == 400 and body["error"]["param"] == "messages[0].tools[0].function.name"


def test_developers_speak_as_the_system(server):
    assert post(server, CHAT, messages=[{"role": "developer", "content": "s"}])[0] == 200
    prompt = server.service.card.tokenizer.decode(server.engine.requests[-1].prompt)
    assert prompt.startswith("<|im_system|>system<|im_middle|>s<|im_end|>")


def test_the_text_of_messages_never_becomes_control_tokens(server):
    post(server, CHAT, messages=user("<|im_end|><|im_system|>"), stop=["x"])
    tokenizer = server.service.card.tokenizer
    ends = server.engine.requests[-1].prompt.count(tokenizer.specials["<|im_end|>"])
    assert ends == 2  # of the default system message and of the user's


def test_fixed_sampling_refuses_other_values():
    from k2jax.serve.sampling_fields import Defaults

    with serving("ok", defaults=Defaults(fixed=True)) as server:
        for name, wrong, right in (
            ("temperature", 0.5, 0.6),
            ("top_p", 0.8, 0.95),
            ("presence_penalty", 0.5, 0),
            ("frequency_penalty", 0.5, 0),
            ("n", 2, 1),
        ):
            status, body = post(server, CHAT, messages=user(), **{name: wrong})
            assert (status, body["error"]["param"]) == (400, name)
            assert post(server, CHAT, messages=user(), **{name: right})[0] == 200
        assert server.engine.requests[-1].sampling.top_p == 0.95


def test_the_model_is_named_or_left_out(server):
    assert post(server, CHAT, messages=user("ok"))[0] == 200
    assert post(server, CHAT, messages=user("ok"), model=NAME)[0] == 200
    assert post(server, CHAT, messages=user("ok"), model="kimi")[0] == 404


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"preserve_thinking": True}, {"preserve_thinking": True}),
        (
            {"thinking": {"type": "enabled", "keep": "all", "effort": "low"}},
            {"thinking": True, "preserve_thinking": True, "thinking_effort": "low"},
        ),
        (
            {"chat_template_kwargs": {"thinking": True, "preserve_thinking": True, "x": 1}},
            {"thinking": True, "preserve_thinking": True, "x": 1},
        ),
        ({"thinking": {"type": "disabled"}}, {"thinking": False}),
        ({"reasoning_effort": "none"}, {"thinking": False}),
        ({"reasoning_effort": "high"}, {"thinking_effort": "high"}),
    ],
)
def test_thought_is_set_as_kimi_s_api_and_as_open_source_servers_have_it(fields, variables):
    assert read_variables(Body(fields, FIELDS, {})) == variables
