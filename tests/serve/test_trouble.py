"""What a server meets: too much, too large, strangers, clients that leave or do not read."""

import asyncio
import json
import socket
import threading
import time

import httpx
import pytest
from serving import BYTES, serving, user, wait_until

from k2jax.serve.service import Limits

CHAT = "/v1/chat/completions"


def endless(request):
    return "a" * 3000


def open_socket(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def raw_request(**fields):
    body = json.dumps({"messages": user(), **fields}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body


def test_a_full_queue_asks_to_come_again():
    with serving(endless, engine={"rows": 1, "queue": 0, "seconds": 0.01}) as server:
        with server.http.stream("POST", CHAT, json={"messages": user(), "stream": True}):
            answer = server.http.post(CHAT, json={"messages": user()})
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"


def test_prompts_of_one_request_wait_for_each_other_where_the_queue_is_short():
    with serving("ab", engine={"rows": 2, "queue": 0}) as server:
        prompts = [[97]] * 9
        answer = server.http.post("/v1/completions", json={"prompt": prompts})
        assert [choice["text"] for choice in answer.json()["choices"]] == ["ab"] * 9


def test_a_large_body_is_refused_whether_it_says_its_length_or_not():
    with serving("ok", limits=Limits(body=1000)) as server:
        body = json.dumps({"messages": user("a" * 2000)}).encode()
        assert server.http.post(CHAT, json=json.loads(body)).status_code == 413

        def chunks():
            yield from (body[:500], body[500:])

        headers = {"content-type": "application/json"}
        assert server.http.post(CHAT, content=chunks(), headers=headers).status_code == 413
        assert server.http.post(CHAT, json={"messages": user()}).status_code == 200


def test_a_body_that_never_comes_is_given_up():
    with serving("ok", limits=Limits(body_seconds=0.2)) as server:
        with open_socket(server.url) as stranger:
            stranger.sendall(raw_request()[:-5])
            assert b" 408 " in stranger.recv(1000).splitlines()[0]


def test_a_key_opens_the_server():
    with serving("ok", keys=("secret", "other")) as server:
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer secre"}, 401),
            ({"authorization": "Basic secret"}, 401),
            ({"authorization": "Bearer \u00e9".encode()}, 401),
            ({"authorization": "Bearer secret"}, 200),
            ({"authorization": "bearer other"}, 200),
        ):
            answer = server.http.post(CHAT, json={"messages": user()}, headers=headers)
            assert answer.status_code == status
        assert server.http.get("/metrics").status_code == 401
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/").status_code == 200


def test_pages_of_other_sites_are_refused():
    with serving("ok", hosts=("localhost", "127.0.0.1")) as server:
        own = server.url.removeprefix("http://")
        for headers, status in (
            ({"origin": f"http://{own}"}, 200),
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"host": "evil.example:8000"}, 403),
            ({"host": "localhost:8000"}, 200),
        ):
            answer = server.http.post(CHAT, json={"messages": user()}, headers=headers)
            assert answer.status_code == status
        form = {"content-type": "text/plain"}
        assert server.http.post(CHAT, content=b"{}", headers=form).status_code == 415


@pytest.mark.parametrize("stream", [True, False])
def test_the_slot_of_a_client_that_left_is_free_within_a_step(stream):
    with serving(endless, engine={"seconds": 0.3}) as server:
        with open_socket(server.url) as client:
            client.sendall(raw_request(stream=stream))
            wait_until(lambda: server.engine.new_tokens > 2)
        before = server.engine.new_tokens
        wait_until(lambda: server.engine.stats().running == 0)
        assert server.engine.aborted == [1] and server.engine.new_tokens <= before + 2
        wait_until(lambda: "k2jax_clients_gone_total 1" in server.http.get("/metrics").text)


def test_a_request_that_fails_fails_alone():
    def script(request):
        bad = BYTES.encode("poison")
        text = BYTES.decode(request.prompt)
        return [*b"ab", -1] if BYTES.decode(bad) in text else "fine"

    with serving(script) as server:
        one = server.http.post(CHAT, json={"messages": user("poison")})
        assert one.status_code == 500 and one.json()["error"]["message"] == "logits are not finite"
        with server.http.stream(
            "POST", CHAT, json={"messages": user("poison"), "stream": True}
        ) as answer:
            events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        assert answer.status_code == 200 and "not finite" in events[-2] and events[-1] == "[DONE]"
        good = server.http.post(CHAT, json={"messages": user()})
        assert good.json()["choices"][0]["message"]["content"] == "fine"


def test_a_template_that_fails_is_the_request_s_mistake():
    from k2jax.text.jinja_template import FolderTemplate
    from k2jax.text.kimi_tokenizer import Tokenizer

    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    source = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}x"
    tokenizer.template = FolderTemplate({"default": source}, tokenizer.specials, "template")
    with serving("ok", tokenizer=tokenizer) as server:
        assert server.http.post(CHAT, json={"messages": user("bad")}).status_code == 400
        assert server.http.post(CHAT, json={"messages": user("good")}).status_code == 200
        escape = {"chat_template_kwargs": {"messages": []}}
        assert server.http.post(CHAT, json={"messages": user(), **escape}).status_code == 400


def test_an_error_of_the_server_says_nothing_of_the_prompt():
    lines = []

    def script(request):
        raise ValueError(BYTES.decode(request.prompt))

    with serving(script, log=lines.append) as server:
        answer = server.http.post(CHAT, json={"messages": user("SECRET")})
        assert answer.status_code == 500 and "SECRET" not in answer.text
        assert any("ValueError in" in line for line in lines)
        assert not any("SECRET" in line for line in lines)
        assert server.http.post(CHAT, json={"messages": user("SECRET")}).status_code == 500


@pytest.mark.parametrize("log_texts", [False, True])
def test_prompts_are_logged_only_if_that_is_asked_for(log_texts):
    lines = []
    with serving("ANSWER", log=lines.append, log_texts=log_texts) as server:
        server.http.post(CHAT, json={"messages": user("SECRET")})
        server.http.post(CHAT, json={"messages": user("SECRET"), "stream": True})
        server.http.post(CHAT, json={"messages": user("SECRET"), "temperature": "SECRET"})
    text = "\n".join(lines)
    assert "POST /v1/chat/completions 200" in text and " 400 " in text
    assert ("SECRET" in text) == log_texts


def test_a_client_that_does_not_read_stalls_nobody():
    text = "a" * 3000
    with serving(lambda request: text, context=8192) as server:
        lazy = [open_socket(server.url) for _ in range(4)]
        for client in lazy:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.sendall(raw_request(stream=True, n=8))
        began = time.monotonic()
        answer = server.http.post(CHAT, json={"messages": user()})
        assert answer.json()["choices"][0]["message"]["content"] == text
        assert time.monotonic() - began < 50  # not until the server gives them up
        for client in lazy:
            client.close()
        wait_until(lambda: server.engine.stats().running == 0)


def test_a_client_that_takes_nothing_for_long_is_given_up():
    with serving(
        endless, limits=Limits(stalled_seconds=0.3), context=8192, engine={"seconds": 0.002}
    ) as server:
        with open_socket(server.url) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)  # full soon
            client.sendall(raw_request(stream=True, n=64, logprobs=True, top_logprobs=20))
            wait_until(lambda: server.service.meters.gone == 1)


def test_streams_say_something_while_they_wait():
    with serving("ab", limits=Limits(keepalive_seconds=0.05), engine={"seconds": 0.3}) as server:
        with server.http.stream("POST", CHAT, json={"messages": user(), "stream": True}) as answer:
            assert ": waiting" in list(answer.iter_lines())


def test_a_server_that_drains_answers_what_runs_and_nothing_else():
    with serving(lambda request: "a" * 50, engine={"seconds": 0.02}) as server:
        answers = []

        def ask():
            with httpx.Client(base_url=server.url, timeout=60) as client:
                answers.append(client.post(CHAT, json={"messages": user()}))

        thread = threading.Thread(target=ask)
        with httpx.Client(base_url=server.url, timeout=60) as waiting:
            waiting.get("/health")
            thread.start()
            wait_until(lambda: server.engine.new_tokens > 2)
            server.service.draining = True
            assert waiting.get("/health").status_code == 503
            refused = waiting.post(CHAT, json={"messages": user()})
            assert refused.status_code == 503 and "retry-after" in refused.headers
        thread.join()
        assert answers[0].json()["choices"][0]["message"]["content"] == "a" * 50


def test_many_at_once_are_all_answered():
    async def ask_all(url):
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
            texts = [f"text {i}" for i in range(64)]
            posts = [client.post(CHAT, json={"messages": user(text)}) for text in texts]
            answers = await asyncio.gather(*posts)
            said = [a.json()["choices"][0]["message"]["content"] for a in answers]
            assert said == texts

    from serving import say_what_user_says

    with serving(say_what_user_says, engine={"rows": 8}) as server:
        asyncio.run(ask_all(server.url))
