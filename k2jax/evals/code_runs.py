"""Programs of models, run in the sandbox: what benchmarks of code share."""

import dataclasses
import math
import re
import signal
import threading

from k2jax.evals.task import FAILED, PASSED, TIMED_OUT, Verdict
from k2jax.sandbox import Limits, Outcome, Sandbox

REASON = 300  # characters of an error that are kept
BUSY = 4  # times as slow as alone; a program that only waits is given that long
BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.M)

_lock = threading.Lock()
_shared: list[Sandbox] = []


def shared_sandbox(isolated: bool = True) -> Sandbox:
    """The sandbox of this process, started when it is first needed.

    Args:
        isolated: False, in the first call: programs run with limits only, as the user.

    Raises:
        SandboxError: programs cannot be isolated here.
    """
    with _lock:
        if not _shared:
            _shared.append(Sandbox(isolated=isolated))
        return _shared[0]


def extract_blocks(text: str, languages: tuple[str, ...] = ()) -> list[str]:
    """Contents of Markdown's fenced blocks, in order.

    Args:
        text: an answer.
        languages: tags that count, lower case, where any block has one of them; otherwise all do.
    """
    blocks = [(tag.lower(), content) for tag, content in BLOCK.findall(text)]
    named = [content for tag, content in blocks if tag in languages]
    return named or [content for _, content in blocks]


def cut_at_stops(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first of the stops."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def to_verdict(outcome: Outcome, has_passed: bool, program: str) -> Verdict:
    """What the end of a program that tests itself says.

    Args:
        outcome: how it ended.
        has_passed: whether its tests were run to their end without an error.
        program: for the ledger.
    """
    if has_passed:
        return Verdict(1.0, PASSED, program)
    named = {"timeout": TIMED_OUT, "exited": FAILED, "signal": FAILED, "killed": FAILED}
    result = named.get(outcome.status, outcome.status)
    if has_used_its_time(outcome):
        result = TIMED_OUT
    return Verdict(0.0, result, program, describe_end(outcome))


def has_used_its_time(outcome: Outcome) -> bool:
    """Whether the limit of CPU seconds ended a program."""
    return outcome.status == "signal" and outcome.code == signal.SIGXCPU


def describe_end(outcome: Outcome) -> str:
    """One line: why a program that should have passed did not."""
    lines = outcome.stderr.decode("utf-8", "replace").strip().splitlines()
    if has_used_its_time(outcome):
        return "used its seconds of CPU"
    if outcome.status == "signal":
        return f"signal {outcome.code}"
    if outcome.status != "exited":
        return f"ended by the limit of {outcome.status}"
    return lines[-1][:REASON] if lines else f"left with exit code {outcome.code} before its tests"


def limit_time(seconds: float, limits: Limits) -> Limits:
    """Limits with `seconds` of CPU, which on a busy machine are as many, and more by the clock."""
    return dataclasses.replace(limits, wall=BUSY * seconds, cpu=math.ceil(seconds))
