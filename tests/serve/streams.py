"""Fuzzed requests, and clients that join what is streamed and compare it with what is not."""

import asyncio
import json

CHAT = "/v1/chat/completions"
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "a-b.c", "parameters": WEATHER_SCHEMA}}


def draw(rng):
    fields = {"messages": [{"role": "user", "content": "x"}], "seed": rng.getrandbits(32)}
    fields |= {"tools": [TOOL]} if rng.random() < 0.7 else {}
    fields |= {"stop": rng.choice(["STOP", ["T", "aa"], "\u6f22"])} if rng.random() < 0.4 else {}
    fields |= {"max_tokens": rng.randint(1, 60)} if rng.random() < 0.4 else {}
    fields |= {"logprobs": True, "top_logprobs": 2} if rng.random() < 0.3 else {}
    fields |= {"n": rng.randint(2, 3)} if rng.random() < 0.2 else {}
    return fields | ({"parallel_tool_calls": False} if rng.random() < 0.2 else {})


def join(events):
    """As a client joins chunks; ours is written anew here."""
    choices = {}
    for chunk in events:
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {"content": "", "calls": {}, "scores": []})
            delta = piece["delta"]
            for name in ("content", "reasoning", "reasoning_content"):
                choice[name] = choice.get(name, "") + (delta.get(name) or "")
            for call in delta.get("tool_calls") or ():
                known = choice["calls"].setdefault(call["index"], {"arguments": ""})
                known |= (
                    {"id": call["id"], "name": call["function"]["name"]} if "id" in call else {}
                )
                known["arguments"] += call["function"]["arguments"]
            choice["scores"] += (piece["logprobs"] or {}).get("content", [])
            choice["finish"] = piece["finish_reason"] or choice.get("finish")
    return [choices[place] for place in sorted(choices)]


def whole(answer):
    out = []
    for choice in answer["choices"]:
        message = choice["message"]
        calls = {
            i: {"id": c["id"], **c["function"]} for i, c in enumerate(message.get("tool_calls", ()))
        }
        texts = {n: message.get(n) or "" for n in ("content", "reasoning", "reasoning_content")}
        scores = (choice["logprobs"] or {}).get("content", [])
        finish = choice["finish_reason"]
        out.append({**texts, "calls": calls, "scores": scores, "finish": finish})
    return out


async def stream(client, fields, rng):
    events = []
    leaves = rng.random() < 0.1
    async with client.stream("POST", CHAT, json={**fields, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            if rng.random() < 0.02:
                await asyncio.sleep(0.02)  # a slow reader
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
            if leaves and len(events) > 2:
                return None
    return join(events)


async def compare(client, fields, rng, gate):
    async with gate:
        answer = await client.post(CHAT, json=fields)
        assert answer.status_code == 200, answer.text
        streamed = await stream(client, fields, rng)
    return streamed is None or streamed == whole(answer.json())


def draw_for_model(rng, tokenizer):
    """A request to a model with random weights, which is pushed towards marks and odd bytes."""
    text = "".join(rng.choice("ab \u6f22\u00e9\U0001f600") for _ in range(rng.randint(1, 12)))
    fields = {"messages": [{"role": "user", "content": text}], "seed": rng.getrandbits(32)}
    fields |= {"temperature": rng.choice([0, 0.7, 1, 1.5]), "max_tokens": rng.randint(1, 48)}
    marks = list(tokenizer.specials.values())
    pushed = rng.sample(marks, 6) + [rng.randrange(tokenizer.vocab) for _ in range(40)]
    fields["logit_bias"] = {str(id_): rng.uniform(1, 6) for id_ in pushed}
    fields |= {"stop": rng.choice(["e", ["a", "zz"], "\u6f22"])} if rng.random() < 0.3 else {}
    fields |= {"logprobs": True, "top_logprobs": 2} if rng.random() < 0.2 else {}
    fields |= {"n": rng.randint(2, 3)} if rng.random() < 0.1 else {}
    kind = rng.random()
    if kind < 0.2:
        fields |= {"tools": [TOOL]}
    elif kind < 0.45:
        fields |= {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 150}
    elif kind < 0.6:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": WEATHER_SCHEMA}}
        fields |= {"response_format": form, "max_tokens": 90}
    return fields
