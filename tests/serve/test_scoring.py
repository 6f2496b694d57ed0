"""Echoed prompts with log-probabilities, as evaluation harnesses ask for them; tokens; metrics."""

import pytest
from serving import BYTES


def post(server, path, **fields):
    answer = server.http.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("new", [0, 1])
def test_a_harness_gets_the_log_likelihood_of_a_continuation(server, new):
    """lm-eval's `local-completions`: ids, echo, logprobs 1, one new token that it cuts off."""
    context, continuation = [*b"de"], [*b"ab"]
    body = {"prompt": [context + continuation] * 2, "temperature": 0, "max_tokens": new}
    answer = post(server, "/v1/completions", **body, logprobs=1, seed=1234, echo=True)
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        scores = choice["logprobs"]
        cut = len(context) + len(continuation)
        assert len(scores["tokens"]) == cut + new
        values = scores["token_logprobs"][len(context) : cut]
        # Made up by the scripted engine: "a" is the likeliest, "b" is not among the first.
        assert values == [-0.5, -2.098] and scores["token_logprobs"][0] is None
        likeliest = [max(top.values()) for top in scores["top_logprobs"][len(context) : cut]]
        assert likeliest == [-0.5, -0.5]
        assert choice["text"].startswith("deab") and scores["text_offset"][:4] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 8


def test_an_echoed_text_has_no_begin_of_document_in_it(server):
    (choice,) = post(server, "/v1/completions", prompt="ab", echo=True, logprobs=0, max_tokens=0)[
        "choices"
    ]
    assert choice["text"] == "ab" and choice["logprobs"]["tokens"] == ["[BOS]", "a", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    assert choice["finish_reason"] == "length"


def test_a_streamed_echo_says_the_same(server):
    fields = {"prompt": "ab", "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0}
    whole = post(server, "/v1/completions", **fields)["choices"][0]
    chunks = list(server.client.completions.create(model="tiny", stream=True, **fields))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole["text"]
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
    assert streamed == whole["logprobs"]["tokens"]


def test_prompt_logprobs_are_given_as_open_source_servers_do(server):
    answer = post(server, "/v1/completions", prompt=[*b"ab"], prompt_logprobs=1, max_tokens=1)
    entries = answer["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    assert entries[1]["98"] == {"logprob": -2.098, "rank": None, "decoded_token": "b"}
    assert entries[1]["97"]["rank"] == 1


def test_text_becomes_ids_and_text_again(server):
    tokens = post(server, "/tokenize", prompt="a\u00e9", add_special_tokens=False)
    assert tokens["tokens"] == [*"a\u00e9".encode()] and tokens["count"] == 3
    assert post(server, "/detokenize", tokens=tokens["tokens"])["prompt"] == "a\u00e9"
    assert post(server, "/tokenize", prompt="a")["tokens"] == [BYTES.bos, 97]
    info = server.http.get("/tokenizer_info").json()
    # A harness asks for the id of the end by its name.
    named = post(server, "/tokenize", prompt=info["eos_token"], add_special_tokens=False)
    assert named["tokens"] == [BYTES.eos]
    plain = post(server, "/tokenize", prompt="[EOS]", add_special_tokens=False, parse_special=False)
    assert plain["tokens"] == [*b"[EOS]"]
    chat = post(server, "/tokenize", messages=[{"role": "user", "content": "a"}])
    assert BYTES.decode(chat["tokens"]).endswith("<|im_assistant|>assistant<|im_middle|>")
    named = post(server, "/tokenize", prompt="a", return_token_strs=True)["token_strs"]
    assert named == ["[BOS]", "a"]
    assert server.http.post("/detokenize", json={"tokens": [9999]}).status_code == 400


def test_metrics_are_text_that_prometheus_reads(server):
    post(server, "/v1/completions", prompt="a")
    text = server.http.get("/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(len(line.rsplit(" ", 1)) == 2 for line in lines)
    values = dict(line.rsplit(" ", 1) for line in lines)
    counted = values['k2jax_http_responses_total{path="/v1/completions",status="200"}']
    assert float(counted) >= 1 and "k2jax_running" in values
    assert "# TYPE k2jax_new_tokens_total counter" in text
    buckets = [v for name, v in values.items() if name.startswith("k2jax_time_to_first_token")]
    assert float(buckets[-1]) >= 1
