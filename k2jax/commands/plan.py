"""`k2jax plan`: estimate memory, time and cost on hardware you don't have."""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from k2jax import configs
from k2jax.config import (
    MESH_AXES,
    ConfigError,
    RunConfig,
    flatten_settings,
    nearest,
    override,
    validate,
)
from k2jax.planner import cost, serving, targets
from k2jax.planner import hbm as memory
from k2jax.planner.decoding import WEIGHTS
from k2jax.planner.estimate import Estimate
from k2jax.planner.plan_text import describe_plan
from k2jax.planner.search import Search, candidates, reason, remedies, search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `k2jax plan`; the config's fields are settings as in `k2jax train`."""
    parser.add_argument("config", help=f"{', '.join(configs.NAMES)}, or a published config.json")
    parser.add_argument("--target", required=True, help=f"machines, e.g. {targets.EXAMPLES}")
    parser.add_argument(
        "--mesh",
        default="",
        metavar="A=N,...",
        help="sizes of some mesh axes; the others are searched",
    )
    parser.add_argument(
        "--decode",
        metavar="BATCHxCONTEXT",
        help="plan decoding of so many rows with so many tokens in the cache, instead of training",
    )
    parser.add_argument(
        "--weights",
        choices=tuple(WEIGHTS),
        help="with --decode: how weights are resident; default: bf16",
    )
    parser.add_argument(
        "--prefill",
        type=int,
        metavar="N",
        help="with --decode: also plan calls that read, or score, so many tokens of prompts",
    )
    parser.add_argument(
        "--api-dollars",
        metavar="IN,OUT",
        help="with --decode: compare with an API's price of a million tokens in and out",
    )
    parser.add_argument(
        "--in-per-out",
        type=float,
        default=3.0,
        metavar="X",
        help="tokens of prompts for each new token, in that comparison; default: 3",
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        default=1.0,
        metavar="X",
        help="share of the planned speed that is reached, in that comparison; default: 1",
    )
    parser.add_argument(
        "--seat-dollars",
        type=float,
        default=200.0,
        metavar="X",
        help="a month of a subscription, in that comparison; default: 200",
    )
    parser.add_argument("--tokens", type=float, metavar="N", help="of the run; default: its steps")
    parser.add_argument("--dollars-per-hour", type=float, metavar="X", help="of a chip")
    parser.add_argument("--watts", type=float, metavar="X", help="of a chip, host included")
    parser.add_argument("--compile", action="store_true", help="ask the target's real compiler too")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="compile every program of the run, count what its hosts do, and run a small copy here",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def plan(  # noqa: PLR0913, the options of the command
    config: RunConfig | str,
    target: str,
    *,
    mesh: Mapping[str, int] | None = None,
    decode: str = "",
    weights: str | None = None,
    prefill: int | None = None,
    api_dollars: str | None = None,
    in_per_out: float = 3.0,
    efficiency: float = 1.0,
    seat_dollars: float = 200.0,
    tokens: float | None = None,
    dollars_per_hour: float | None = None,
    watts: float | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Estimate memory, time and cost of a run on other hardware: `k2jax plan` for Python.

        plan = k2jax.plan("kimi_k2", "v5p:8x8x16")
        plan["fits"], plan["mesh"], plan["bytes_per_device"]["peak"]

    Args:
        config: a config, the name of one, or a published `config.json`.
        target: machines, such as "v5p:8x8x16" or "h200:16x8".
        mesh: sizes of mesh axes that are fixed; the others are searched.
        decode: "BATCHxCONTEXT": plan decoding of so many rows and tokens instead of training.
        weights: with `decode`, "bf16" (the default), "fp8" or "int4", as they are resident.
        prefill: with `decode`, also plan calls that read, or score, so many tokens of prompts.
        api_dollars: with `decode`, "IN,OUT": an API's price of a million tokens, to compare with.
        in_per_out: tokens of prompts for each new one, in that comparison.
        efficiency: share of the planned speed that is reached, in that comparison.
        seat_dollars: of a month of a subscription, in that comparison.
        tokens: of the whole run; default: those of its steps.
        dollars_per_hour: price of a chip; default: the table's.
        watts: power of a chip, its share of the host included; default: the table's.
        **settings: as for `k2jax.configure`.

    Returns:
        The plan as `k2jax plan --json` prints it; `docs/scaling.md` lists the keys.

    Raises:
        ConfigError: an unknown config, setting or target, or no mesh divides the model.
    """
    changed = flatten_settings(settings)
    run = override(configs.load(config) if isinstance(config, str) else config, changed)
    options = argparse.Namespace(
        target=target,
        mesh=",".join(f"{axis}={size}" for axis, size in (mesh or {}).items()),
        decode=decode,
        weights=weights,
        prefill=prefill,
        api_dollars=api_dollars,
        in_per_out=in_per_out,
        efficiency=efficiency,
        seat_dollars=seat_dollars,
        tokens=tokens,
        dollars_per_hour=dollars_per_hour,
        watts=watts,
        compile=False,
        rehearse=False,
        settings=changed,
    )
    return _make_plan(run, options)[0]


def main(args: argparse.Namespace) -> int:
    """Print the plan; the exit code: 0 where it fits, 1 where nothing does."""
    planned, text = _make_plan(override(configs.load(args.config), args.settings), args)
    sys.stdout.write(json.dumps(planned) + "\n" if args.json else text)
    return 0 if planned["fits"] else 1


def _make_plan(run: RunConfig, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return the plan as JSON and as text."""
    if run.lora.rank:
        raise ConfigError("lora.rank must be 0: plans are of runs in which all weights learn")
    _check(args)
    target = targets.parse(args.target, args.dollars_per_hour, args.watts)
    fixed = _fixed(args.mesh)
    if args.decode:
        wanted = serving.Wanted(
            args.decode,
            args.weights or "bf16",
            args.prefill,
            args.compile,
            _prices(args.api_dollars),
            args.in_per_out,
            args.efficiency,
            args.seat_dollars,
        )
        decoded = serving.plan_serving(run.name, run.model, target, fixed, wanted)
        return decoded, serving.describe_serving(decoded)
    return _training(run, search(run, target, fixed, _keeps_accumulate(args)), args)


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers that make no sense, and options without effect."""
    for option in ("tokens", "dollars-per-hour", "watts", "in-per-out"):
        value = getattr(args, option.replace("-", "_"))
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"--{option} is {value:g}; it must be a number, 0 or more")
    _check_serving(args)
    if args.decode and args.rehearse:
        raise ConfigError("--rehearse is for training; --decode --compile compiles its calls")
    if args.decode and args.tokens is not None:
        raise ConfigError("--tokens is for training; --decode costs a million generated tokens")


def _check_serving(args: argparse.Namespace) -> None:
    for option in ("efficiency", "seat-dollars"):
        if not 0 < getattr(args, option.replace("-", "_")) < math.inf:
            raise ConfigError(f"--{option} must be above 0")
    for option in ("weights", "prefill", "api-dollars"):
        if getattr(args, option.replace("-", "_")) is not None and not args.decode:
            raise ConfigError(f"--{option} is for inference; give --decode BATCHxCONTEXT too")
    if args.weights is not None and args.weights not in WEIGHTS:
        raise ConfigError(f"no weights {args.weights!r}; {nearest(args.weights, WEIGHTS)}")
    if args.prefill is not None and args.prefill < 1:
        raise ConfigError(f"--prefill is {args.prefill}; it must be at least 1")


def _prices(text: str | None) -> tuple[float, float] | None:
    """Dollars of `--api-dollars 0.15,2.50`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+\.?\d*),(\d+\.?\d*)", text)
    if not match or not float(match[2]):
        raise ConfigError(f"--api-dollars takes IN,OUT, not {text!r}; for example 0.15,2.50")
    return float(match[1]), float(match[2])


def _fixed(text: str) -> dict[str, int]:
    """Axis sizes of `--mesh data=8,expert=4`."""
    fixed = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\w+)=([1-9]\d*)", part)
        if not match:
            raise ConfigError(f"--mesh takes axis=size, not {part!r}; for example data=8,expert=4")
        if match[1] not in MESH_AXES:
            raise ConfigError(f"no mesh axis {match[1]!r}; {nearest(match[1], MESH_AXES)}")
        fixed[match[1]] = int(match[2])
    return fixed


def _training(
    run: RunConfig, searched: Search, args: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    best, tried = searched.best, list[dict[str, Any]]()
    compiled: dict[str, Any] = {}
    if args.compile:
        best, compiled, tried = _compile_until_one_fits(run, searched, _keeps_accumulate(args))
    run = _planned(run, best)
    validate(run)
    plan = as_json(best, args.tokens) | {"tried": tried}
    others = [e for e in searched.plans if e.mesh != best.mesh]
    plan["others"] = [
        {"mesh": e.mesh.sizes, "accumulate": e.case.accumulate, "reason": reason(e, best)}
        for e in others[:3]
    ]
    plan["refused"] = dict(searched.refused)
    if not best.fits:
        plan["remedies"] = {words: e.peak for words, e in remedies(run, searched)}
    if "source" in compiled:
        plan["formulas"] = {key: plan[key] for key in COMPILED}
    plan |= compiled
    if args.rehearse:
        plan["rehearsal"] = _rehearse(run, best)
        plan["fits"] = plan["rehearsal"]["fits"]
    return plan, describe_plan(plan, best)


def _keeps_accumulate(args: argparse.Namespace) -> bool:
    return "train.accumulate" in args.settings


def _compile_until_one_fits(
    run: RunConfig, searched: Search, keep: bool
) -> tuple[Estimate, dict[str, Any], list[dict[str, Any]]]:
    """Return the first plan that fits by the compiler, what it says, and those that do not fit.

    If none of `TRIES` fits, the last one is returned.
    """
    # Imported here: it brings jax.
    from k2jax.planner.compiler import DoesNotFitError, compile_step

    tried: list[dict[str, Any]] = []
    for plan in itertools.islice(candidates(searched, keep), TRIES):
        try:
            compiled = compile_step(_planned(run, plan), plan.target).as_json()
            why = f"{compiled['bytes_per_device']['peak'] / 1e9:.1f} GB by the compiler"
        except DoesNotFitError as error:
            compiled, why = {"fits": False}, str(error)
        if compiled["fits"]:
            break
        tried.append({"mesh": plan.mesh.sizes, "accumulate": plan.case.accumulate, "why": why})
    return plan, compiled, tried


def _rehearse(run: RunConfig, best: Estimate) -> dict[str, Any]:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax: no device is touched
    from k2jax.commands.train import print_sample
    from k2jax.planner.rehearsal import rehearse

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    return rehearse(run, best.target, best.seconds, print_sample, say)


TRIES = 4  # plans that are compiled until one fits
# What the compiler is asked too.
COMPILED = (
    "fits",
    "bytes_per_device",
    "flops_per_device",
    "wire_bytes_per_device",
)


def _planned(run: RunConfig, best: Estimate) -> RunConfig:
    train = dataclasses.replace(run.train, accumulate=best.case.accumulate)
    return dataclasses.replace(run, mesh=best.case.mesh, train=train)


def _common(run: RunConfig, best: Estimate) -> dict[str, Any]:
    """Where the run would be, and what bounds it."""
    return {
        "config": run.name,
        "target": best.target.name,
        "source": "formulas",
        "fits": best.fits,
        "devices": best.target.devices,
        "mesh": best.mesh.sizes,
        "hbm_limit_bytes": best.target.hbm,
        "wire_bytes_per_device": best.wire,
        "roofline_seconds": best.roofline,
        "bound": best.bound,
    }


def as_json(best: Estimate, tokens: float | None = None) -> dict[str, Any]:
    """The plan with the keys that `docs/scaling.md` lists."""
    run, target = best.case.run, best.target
    step_tokens = run.data.rows * run.data.context
    tokens = step_tokens * run.train.steps if tokens is None else tokens
    arguments = sum(best.arguments.values())
    batch = best.arguments["batch"]
    per_host = max(1, 4 * target.chip.devices if target.chip.kind == "tpu" else target.shape[-1])
    return {
        **_common(run, best),
        "chips": target.chips,
        "accumulate": best.case.accumulate,
        "bytes_per_device": {
            "arguments": arguments,
            "temporaries": best.peak - arguments,
            "outputs": arguments - batch,
            "aliased": arguments - batch,
            "peak": best.peak,
        },
        "peak_with_headroom_bytes": best.peak_with_headroom,
        "parts_bytes": best.parts,
        "worst_moment": best.worst,
        "host_save_bytes": memory.saving(best.case, per_host),
        "host_offload_bytes": memory.offloaded(best.case, per_host),
        "flops_per_device": best.flops + best.optimizer_flops,
        "optimizer_flops_per_device": best.optimizer_flops,
        "step_seconds": {"overlapped": best.overlapped, "serial": best.seconds},
        "mfu": {"overlapped": best.mfu(best.overlapped), "serial": best.mfu(best.seconds)},
        "cost": {
            "tokens": tokens,
            **cost.training(target, best.seconds, step_tokens, tokens),
        },
    }
