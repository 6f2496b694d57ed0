"""A plan of inference: the decode step and what else was asked for, as JSON and as text."""

import re
from typing import Any, NamedTuple

from k2jax.config import ConfigError, ModelConfig
from k2jax.planner import cost, traffic
from k2jax.planner.decoding import WEIGHTS, Decode, best, decode, decode_calls, prompt_call
from k2jax.planner.search import meshes
from k2jax.planner.targets import Target

HOURS_PER_MONTH = 730
COMPILED = ("fits", "bytes_per_device", "flops_per_device", "wire_bytes_per_device")


def parse_size(text: str, cfg: ModelConfig) -> tuple[int, int]:
    """Rows and tokens of BATCHxCONTEXT.

    Raises:
        ConfigError: it is malformed, or longer than the model's context.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ConfigError(f"--decode takes BATCHxCONTEXT, not {text!r}; for example 256x8192")
    batch, context = int(match[1]), int(match[2])
    if context > cfg.context:
        raise ConfigError(f"--decode {text}: the model's context is {cfg.context}")
    return batch, context


class Wanted(NamedTuple):
    """What is asked of a plan.

    Attributes:
        size: "BATCHxCONTEXT".
        weights: key of `WEIGHTS`.
        prefill: tokens of prompts that are read in a call; None: that is not planned.
        compiled: ask the target's compiler too.
        prices: of an API, dollars a million tokens in and out; None: nothing is compared.
        in_per_out: tokens of prompts for each new one, in that comparison.
        efficiency: share of the planned speed that is reached, in that comparison.
        seat: dollars a month of a subscription, in that comparison.
    """

    size: str
    weights: str = "bf16"
    prefill: int | None = None
    compiled: bool = False
    prices: tuple[float, float] | None = None
    in_per_out: float = 3.0
    efficiency: float = 1.0
    seat: float = 200.0


def plan_serving(
    name: str, cfg: ModelConfig, target: Target, fixed: dict[str, int], wanted: Wanted
) -> dict[str, Any]:
    """Plan decoding of a batch, on the best mesh; the keys are listed in `docs/scaling.md`.

    Args:
        name: of the config.
        cfg: sizes.
        target: the machines.
        fixed: sizes of mesh axes that are not searched.
        wanted: what to plan.

    Raises:
        ConfigError: a malformed option, or no mesh divides the model.
    """
    size, weights, prefill, compiled, *_ = wanted
    batch, context = parse_size(size, cfg)
    searched = meshes(target.devices, fixed)
    plans = best(
        decode_calls(cfg, searched, target, batch, context, WEIGHTS[weights]), prefill or 0
    )
    if not plans:
        raise ConfigError(
            f"no mesh of {target.devices} devices over replica, expert and model divides the model"
        )
    call = plans[0].call
    plan = _as_json(plans[0], compiled) | {
        "config": name,
        "target": target.name,
        "weights": weights,
        "devices": target.devices,
        "mesh": call.mesh.sizes,
        "hbm_limit_bytes": target.hbm,
        "token_seconds": plans[0].seconds,
        "tokens_per_second": batch / plans[0].seconds,
        "tokens_per_second_per_device": batch / plans[0].seconds / target.devices,
        "cost_per_million_tokens": cost.generating(target, plans[0].seconds, batch),
    }
    if prefill is not None:
        for key, scored in (("prefill", False), ("evaluation", True)):
            read = decode(prompt_call(call, prefill, scored))
            plan[key] = _as_json(read, compiled) | {
                "tokens": prefill,
                "seconds": read.seconds,
                "tokens_per_second": prefill / read.seconds,
                "cost_per_million_tokens": cost.generating(target, read.seconds, prefill),
            }
            plan["fits"] = plan["fits"] and plan[key]["fits"]
    if wanted.prices is not None:
        plan["against_api"] = _compare_prices(plan, target, wanted)
    return plan


def _compare_prices(plan: dict[str, Any], target: Target, wanted: Wanted) -> dict[str, float]:
    """What a million new tokens and their prompts cost here and there, and when both are equal."""
    assert wanted.prices is not None
    price_in, price_out = wanted.prices
    api = price_out + wanted.in_per_out * price_in
    parts = [(1.0, plan["cost_per_million_tokens"])]
    if "prefill" in plan:
        parts.append((wanted.in_per_out, plan["prefill"]["cost_per_million_tokens"]))
    own, kwh = (
        sum(n * part[key] for n, part in parts) / wanted.efficiency for key in ("dollars", "kwh")
    )
    month = cost.cost(target, 3600 * HOURS_PER_MONTH)
    seats = month["dollars"] / wanted.seat
    return {
        "in_per_out": wanted.in_per_out,
        "efficiency": wanted.efficiency,
        "api_dollars": api,
        "own_dollars_at_full_load": own,
        "own_kwh_at_full_load": kwh,
        "load_of_equal_cost": own / api,
        "million_tokens_out_a_month_at_full_load": month["dollars"] / own,
        "million_tokens_out_a_month_of_equal_cost": month["dollars"] / api,
        "month_dollars": month["dollars"],
        "seats_of_equal_cost": seats,
        "million_tokens_out_a_month_and_seat": wanted.seat / own,
        "kilowatts": month["kwh"] / HOURS_PER_MONTH,
    }


def _as_json(planned: Decode, compiled: bool) -> dict[str, Any]:
    plan = {
        "source": "formulas",
        "fits": planned.fits,
        "bytes_per_device": planned.memory | {"peak": planned.peak},
        "flops_per_device": planned.flops,
        "wire_bytes_per_device": planned.wire,
        "roofline_seconds": planned.roofline,
        "bound": planned.bound,
    }
    if compiled:
        # Imported here: it brings jax.
        from k2jax.planner.compile_call import compile_call

        found = compile_call(planned.call)
        largest = {"largest_collective_bytes": found.account.largest}
        plan |= found.as_json() | largest | {"formulas": {key: plan[key] for key in COMPILED}}
    return plan


def describe_serving(plan: dict[str, Any]) -> str:
    """The plan as text."""
    sizes = " ".join(f"{axis}={n}" for axis, n in plan["mesh"].items() if n > 1)
    lines = [
        f"{plan['config']} on {plan['target']}, decoding with {plan['weights']} weights",
        f"{'best mesh' if plan['fits'] else 'NOTHING FITS; nearest'}: {sizes or 'one device'}",
        *_describe(plan, plan["hbm_limit_bytes"]),
        f"speed       {plan['tokens_per_second']:,.0f} tokens/s,"
        f" {plan['tokens_per_second_per_device']:,.0f} a device,"
        f" {1e3 * plan['token_seconds']:,.1f} ms a token",
        f"cost        a million tokens out: {_cost(plan['cost_per_million_tokens'])}",
    ]
    for key, words in (("prefill", "reading prompts"), ("evaluation", "scoring texts")):
        if part := plan.get(key):
            lines += [
                f"{words}, {part['tokens']:,} tokens a call",
                *_describe(part, plan["hbm_limit_bytes"]),
                f"speed       {part['tokens_per_second']:,.0f} tokens/s,"
                f" {1e3 * part['seconds']:,.1f} ms a call",
                f"cost        a million tokens in: {_cost(part['cost_per_million_tokens'])}",
            ]
    if against := plan.get("against_api"):
        lines += [
            f"a million new tokens and {against['in_per_out']:g} million of prompts:"
            f" ${against['own_dollars_at_full_load']:,.2f} and"
            f" {against['own_kwh_at_full_load']:,.2f} kWh here at full load,"
            f" ${against['api_dollars']:,.2f} of the API",
            f"equal at    {against['load_of_equal_cost']:.0%} of full load:"
            f" {against['million_tokens_out_a_month_of_equal_cost']:,.0f} million new a month",
            f"a month     ${against['month_dollars']:,.0f}, {against['kilowatts']:.1f} kW; paid by"
            f" {against['seats_of_equal_cost']:,.0f} seats, at full load"
            f" {against['million_tokens_out_a_month_and_seat']:,.0f} million new tokens each",
        ]
    return "\n".join(lines) + "\n"


def _describe(part: dict[str, Any], limit: float) -> list[str]:
    held, sent = part["bytes_per_device"], traffic.total(part["wire_bytes_per_device"]) / 1e6
    roofline = ", ".join(
        f"{name} {1e3 * value:,.2f} ms" for name, value in part["roofline_seconds"].items()
    )
    lines = [
        f"memory      {held['peak'] / 1e9:,.1f} of {limit / 1e9:,.1f} GB a device: "
        + ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in held.items() if name != "peak"),
        f"network     {sent:,.0f} MB sent by a device",
        f"bound by    {part['bound']} ({roofline})",
    ]
    if ours := part.get("formulas"):
        pairs = [
            ("peak GB", *(p["bytes_per_device"]["peak"] / 1e9 for p in (ours, part))),
            ("sent MB", *(traffic.total(p["wire_bytes_per_device"]) / 1e6 for p in (ours, part))),
        ]
        both = ", ".join(f"{name} {a:,.1f} formula {b:,.1f} compiler" for name, a, b in pairs)
        lines.append(f"compiled    in {part['compile_seconds']:.0f} s: {both}")
    return lines


def _cost(parts: dict[str, float]) -> str:
    return (
        f"{parts['hours']:,.3f} hours, {parts['chip_hours']:,.2f} chip hours,"
        f" ${parts['dollars']:,.2f}, {parts['kwh']:,.2f} kWh"
    )
