"""Agents, users and judges behind an OpenAI-compatible endpoint."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from k2jax import cli
from k2jax.post.critic import Critic, CriticError, Ranking
from k2jax.post.synthesis import endpoint
from k2jax.post.synthesis.endpoint import parse_endpoint
from k2jax.post.synthesis.pipeline import FILES, Settings, load_tasks, synthesise
from k2jax.post.synthesis.simulate import STOP
from k2jax.post.synthesis.stored import read_lines


class Model:
    """An endpoint that answers by a function of the request's body."""

    def __init__(self, answer):
        self.answer, self.bodies = answer, []
        model = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                self.send({"data": [{"id": "listed"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                model.bodies.append(body)
                message = model.answer(body)
                if isinstance(message, int):
                    self.send({"error": "no"}, message)
                else:
                    self.send({"choices": [{"message": {"role": "assistant", **message}}]})

            def send(self, value, status=200):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def answer_as_all(body):
    """One model that is the agent, the user and the judge, each as its system prompt says."""
    system = body["messages"][0]["content"]
    if system.startswith("You judge"):
        return {"content": 'I think: {"reason": "fine", "success": true}'}
    if system.startswith("You play"):
        said = len(body["messages"]) > 2
        return {"content": STOP if said else "Please do what I want."}
    if body["messages"][-1]["role"] == "tool":
        return {"content": "That is all."}
    name = body["tools"][0]["function"]["name"]
    call = {"id": "x", "type": "function", "function": {"name": name, "arguments": "not JSON"}}
    return {"content": None, "tool_calls": [call]}


def test_models_play_all_parts_and_what_fails_is_not_kept(tmp_path):
    with Model(answer_as_all) as model:
        settings = Settings(
            tasks=3, tools=8, samples=2, agent=f"{model.url}#a", user=model.url, judge=model.url
        )
        said = []
        synthesise(tmp_path / "out", settings, say=said.append)
    lines = read_lines(tmp_path / "out" / FILES["run"])
    assert len(lines) == 6
    assert {line["agent"] for line in lines} == {"a"}
    assert lines[0]["calls"][0]["result"]["error"]["code"] in ("invalid", "unavailable")
    assert len({body["seed"] for body in model.bodies if body["model"] == "a"}) > 3
    assert {body["model"] for body in model.bodies} == {"a", "listed"}
    assert read_lines(tmp_path / "out" / FILES["write"]) == []
    assert any("not believed, its verdicts are only noted" in line for line in said)


def test_an_agent_that_does_the_task_is_kept_with_its_provenance(made, tmp_path):
    """The endpoint plays the oracle's plan: what an able model would do."""
    _, tasks = load_tasks(made[0])
    plans = {}

    def answer(body):
        user = body["messages"][1]["content"]
        plan = plans.setdefault(user, None)
        step = plan.pop(0)
        if "say" in step:
            return {"content": step["say"]}
        calls = [
            {"id": str(i), "type": "function", "function": {"name": n, "arguments": json.dumps(a)}}
            for i, (n, a) in enumerate(step["calls"])
        ]
        return {"content": "", "tool_calls": calls}

    for line in read_lines(made[0] / FILES["run"]):
        task = next(one for one in tasks if one["id"] == line["task"])
        plans[line["messages"][1]["content"]] = json.loads(json.dumps(task["plan"]))
    with Model(answer) as model:
        settings = Settings(tasks=24, tools=10, faults=0.0, agent=f"{model.url}#able", workers=3)
        synthesise(tmp_path / "able", settings, say=lambda line: None)
    kept = read_lines(tmp_path / "able" / FILES["write"])
    assert len(kept) == 24
    assert {line["provenance"]["answered_by"] for line in kept} == {"able"}


def test_a_served_model_is_an_agent(tmp_path):
    """`k2jax serve` itself, over an engine that calls the first tool and then answers."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
    from serving import NAME, serving

    with serving("I cannot help with that.", context=65536) as server:
        settings = Settings(tasks=2, tools=6, agent=f"{server.url}/v1#{NAME}")
        synthesise(tmp_path / "out", settings, until="run", say=lambda line: None)
    lines = read_lines(tmp_path / "out" / FILES["run"])
    assert {line["messages"][2]["content"] for line in lines} == {"I cannot help with that."}


def test_an_endpoint_that_does_not_answer_is_one_line_and_is_resumed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(endpoint, "TRIES", 2)
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    out = str(tmp_path / "out")
    with Model(lambda body: 503) as model:
        assert cli.main(["synth", out, "--tasks", "2", "--tools", "6", "--agent", model.url]) == 2
        assert "does not answer: HTTP 503" in capsys.readouterr().err
        model.answer = lambda body: {"content": "No."}
        words = ["synth", out, "--tasks", "2", "--tools", "6", "--agent", model.url]
        assert cli.main([*words, "--until", "run"]) == 0
    assert "2 trajectories" in capsys.readouterr().out


def test_a_conversation_that_is_not_taken_ends_alone(tmp_path):
    def answer(body):
        return 400 if len(body["messages"]) > 2 else {"content": "Tell me more, please?"}

    said = []
    with Model(answer) as model:
        settings = Settings(tasks=4, tools=6, agent=f"{model.url}#a")
        synthesise(tmp_path / "out", settings, say=said.append)
    ended = [line["ended"] for line in read_lines(tmp_path / "out" / FILES["run"])]
    assert all("refuses: HTTP 400" in one for one in ended)
    assert read_lines(tmp_path / "out" / FILES["write"]) == []
    assert any("were not taken, such as refused: http" in line for line in said)
    assert any("replay: 4 of 4" in line for line in said)


def judge_by(better):
    """A judge that sees two answers and says which is better."""

    def answer(body):
        text = body["messages"][1]["content"]
        first, _, second = text.partition("First:\n")[2].partition("\n\nSecond:\n")
        return {"content": f"Well, {json.dumps({'reason': '', 'better': better(first, second)})}"}

    return answer


def test_pairs_are_judged_in_both_orders_and_disagreement_is_reported():
    answers = ["a", "aaa", "aa"]
    with Model(judge_by(lambda x, y: "first" if len(x) > len(y) else "second")) as model:
        critic = Critic(parse_endpoint(f"{model.url}#judge"))
        assert critic.rank("?", answers) == Ranking((0.0, 1.0, 0.5), 0.0, 0)
        assert len(model.bodies) == 6
        assert critic.compare("?", answers) == (
            [{"wins": 0.0}, {"wins": 1.0}, {"wins": 0.5}],
            {"disagreement": 0.0, "unread": 0.0},
        )
        assert all(body["temperature"] == 0 for body in model.bodies)
        model.answer = judge_by(lambda x, y: "first")  # whatever is shown first
        assert critic.rank("?", answers) == Ranking((0.5, 0.5, 0.5), 1.0, 0)
        model.answer = lambda body: {"content": "I like both."}
        assert critic.rank("?", answers) == Ranking((0.5, 0.5, 0.5), 0.0, 6)


def test_rubrics_are_parts_of_a_reward():
    with Model(lambda body: {"content": '{"reason": "", "score": 5}'}) as model:
        critic = Critic(parse_endpoint(f"{model.url}#judge"))
        parts = critic.score("?", "!")
        assert set(parts) == {"helpful", "true", "clear", "plain"}
        assert sum(parts.values()) == 0.5
        model.answer = lambda body: {"content": '{"score": 11}'}
        with pytest.raises(CriticError, match="helpful: the judge gives the score 11"):
            critic.score("?", "!")
