"""Serve runs/tiny as the README says, talk to it, and end it with SIGTERM."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
from openai import OpenAI

ROOT = Path(__file__).parents[1]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}


def main() -> int:
    """0 when the server answered, and ended with 0."""
    command = [ROOT / ".venv/bin/k2jax", "serve", "runs/tiny", "--port", "0"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        began = time.perf_counter()
        line = server.stdout.readline()
        url = re.search(r"http://\S+", line)[0]
        sys.stdout.write(f"{line.strip()} after {time.perf_counter() - began:.1f} s\n")
        talk(OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120))
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    finally:
        server.kill()
    sys.stdout.write(f"SIGTERM: exit {code}\n")
    return code


def talk(client: OpenAI) -> None:
    """A chat, streamed and not, a call, and a text scored."""
    messages = [{"role": "user", "content": "import"}]
    request = {"model": "tiny", "messages": messages, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**request).choices[0].message.content
    chunks = client.chat.completions.create(**request, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole, (streamed, whole)
    sys.stdout.write(f"it says {whole!r}\n")
    answer = client.chat.completions.create(
        model="tiny", messages=messages, tools=[TOOL], tool_choice="required", max_tokens=120
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    for call in answer.choices[0].message.tool_calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        sys.stdout.write(f"{call.id} {call.function.arguments}\n")
    scored = client.completions.create(
        model="tiny", prompt="import os", echo=True, logprobs=1, max_tokens=0
    )
    assert scored.choices[0].logprobs.token_logprobs[0] is None


if __name__ == "__main__":
    sys.exit(main())
