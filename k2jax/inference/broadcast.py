"""The engine in several processes: process 0 schedules, all compute.

Process 0 sends the plan of each step, a few numbers for every sequence; the others hold the same
page tables and sampling state, and follow. Tokens come out the same in all of them.
"""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np

from k2jax.cluster import Group
from k2jax.inference.executor import Answer, Begin, Call, Executor, Masks, Plan
from k2jax.inference.request import Result, Sampling, TokenLogprob
from k2jax.inference.scheduler import Part

TOPIC = "inference"


class TeamExecutor(Executor):
    """An executor that computes each step in all processes of a group."""

    def __init__(self, group: Group, *args: Any):
        """Join the others; `args` are an `Executor`'s."""
        super().__init__(*args)
        self._group, self._messages = group, 0

    def warm_up(self) -> None:
        """Compile, and wait until all have: nobody waits long within a step."""
        self.runner.warm_up()
        self._group.require_equal(f"{TOPIC}: compiled", {})
        super().warm_up()

    def run(self, plan: Plan, mask: Callable[[], Masks]) -> list[Answer]:
        """Compute a step here and in all others."""
        self._tell({"plan": encode_plan(plan)})

        def shared_mask() -> Masks:
            masks = mask()
            if plan.constrained:
                self._tell({row: _encode(bits) for row, bits in masks.items()})
            return masks

        return super().run(plan, shared_mask)

    def follow(self) -> list[Result]:
        """Compute what process 0 says until it sends results, or none at its end."""
        while "plan" in (message := self._tell()):
            plan = decode_plan(message["plan"])

            def receive_masks(plan: Plan = plan) -> Masks:
                masks = self._tell() if plan.constrained else {}
                return {int(row): _decode(text) for row, text in masks.items()}

            super().run(plan, receive_masks)
        return [_decode_result(result) for result in message["results"]]

    def end(self, results: list[Result]) -> None:
        """Tell the others what came out, but for experts; they stop to follow."""
        told = [vars(result) | {"experts": None} for result in results]
        self._tell({"results": [list(fields.values()) for fields in told]})

    def _tell(self, value: Any = None) -> Any:
        self._messages += 1
        return self._group.tell(f"{TOPIC} {self._messages}", value)


def encode_plan(plan: Plan) -> Any:
    """Return a plan as JSON has it."""
    begun = [[b.row, vars(b.sampling), list(b.prompt), list(b.new)] for b in plan.begun]
    return [begun, plan.calls, plan.constrained]


def decode_plan(value: Any) -> Plan:
    """Return the plan that `encode_plan` was given."""
    begun, calls, constrained = value
    return Plan(
        [Begin(row, _decode_sampling(kind), prompt, new) for row, kind, prompt, new in begun],
        [Call([Part(*part) for part in parts], *rest) for parts, *rest in calls],
        constrained,
    )


def _decode_sampling(kind: dict[str, Any]) -> Sampling:
    bias = {int(token): value for token, value in kind["logit_bias"].items()}
    return Sampling(**(kind | {"logit_bias": bias}))


def _decode_result(value: list[Any]) -> Result:
    ids, text, logprobs, prompt_logprobs, *rest = value

    def decode_entry(entry: Any) -> TokenLogprob | None:
        return entry and TokenLogprob(entry[0], entry[1], tuple(map(tuple, entry[2])))

    entries = (tuple(map(decode_entry, each)) for each in (logprobs, prompt_logprobs))
    return Result(tuple(ids), text, *entries, *rest)  # type: ignore[arg-type]


def _encode(bits: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(bits, "<u4").tobytes()).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u4")
