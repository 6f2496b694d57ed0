"""A plan of training as text."""

from typing import Any

from k2jax.planner import traffic
from k2jax.planner.estimate import Estimate


def describe_plan(plan: dict[str, Any], best: Estimate) -> str:
    """Lay out a plan of training as text."""
    lines = [
        f"{plan['config']} on {plan['target']}: {plan['devices']} devices of"
        f" {_gb(plan['hbm_limit_bytes'])}",
        f"{'best mesh' if best.fits else 'NOTHING FITS; nearest'}: {best.case.mesh},"
        f" {plan['accumulate']} micro-batches",
        f"memory      {_gb(best.peak)} a device at its worst, in '{best.worst}';"
        f" {_gb(best.peak_with_headroom)} with headroom",
        *(f"  {_gb(size):>12} {name}" for name, size in best.parts.items() if size > 1e7),
    ]
    roofline = best.roofline
    lines += [
        f"step        {_short(best.overlapped)} s if all overlaps, {_short(best.seconds)} s if the"
        f" network waits; MFU {best.mfu(best.overlapped):.0%} to {best.mfu(best.seconds):.0%}",
        f"bound by    {best.bound} ("
        + ", ".join(f"{name} {_short(value)} s" for name, value in roofline.items())
        + ")",
        f"FLOPs       {_short(plan['flops_per_device'] / 1e12)} TFLOP a device and step,"
        f" {_short(best.optimizer_flops / 1e12)} of them Newton-Schulz",
        f"network     {_gb(traffic.total(best.wire))} sent by a device in a step",
        *(
            f"  {_gb(sent):>12} {kind} over {axes}"
            for kind, row in sorted(best.wire.items())
            for axes, sent in row.items()
            if sent > 1e7
        ),
        f"host        {_gb(plan['host_save_bytes'])} a host for a save in the background"
        + (f", {_gb(away)} for layers' inputs" if (away := plan["host_offload_bytes"]) else ""),
        f"cost        {plan['cost']['tokens']:.3g} tokens: {_cost(plan['cost'])}",
    ]
    for refused in plan["tried"]:
        lines.append(
            f"tried       {_mesh(refused)}, {refused['accumulate']} micro-batches: {refused['why']}"
        )
    for other in plan["others"]:
        lines.append(f"not         {_mesh(other)}: {other['reason']}")
    if plan["refused"]:
        refused = ", ".join(f"{axis} ({n})" for axis, n in plan["refused"].items())
        lines.append(f"not         meshes that do not divide {refused}")
    for words, peak in plan.get("remedies", {}).items():
        lines.append(f"would take  {_gb(peak)} with {words}")
    if "formulas" in plan:
        lines += _beside(plan)
    if "rehearsal" in plan:
        lines += describe_rehearsal(plan["rehearsal"])
    return "\n".join(lines) + "\n"


def _beside(plan: dict[str, Any]) -> list[str]:
    """Formulas and compiler, line by line."""
    ours, real = plan["formulas"], plan
    rows = [
        (f"{name} GB", ours["bytes_per_device"][name] / 1e9, real["bytes_per_device"][name] / 1e9)
        for name in ("arguments", "temporaries", "peak")
    ]
    rows.append(("TFLOP", ours["flops_per_device"] / 1e12, real["flops_per_device"] / 1e12))
    wires = [traffic.total(plan["wire_bytes_per_device"]) / 1e9 for plan in (ours, real)]
    rows.append(("sent GB", wires[0], wires[1]))
    lines = [
        f"{'compiled in ' + format(real['compile_seconds'], '.0f') + ' s':20} formula compiler"
    ]
    lines += [f"  {name:18} {_short(mine):>8} {_short(its):>8}" for name, mine, its in rows]
    return lines


def describe_rehearsal(rehearsal: dict[str, Any]) -> list[str]:
    """Programs and phases of a host, a line each."""
    lines = [
        f"{'rehearsal: programs, GB a device':40}"
        f"{'arguments':>10}{'peak':>8}{'beside':>8}{'total':>8}{'seconds':>9}"
    ]
    for row in rehearsal["programs"]:
        if "why" in row:
            lines.append(f"  {row['name']:38} {row['why']}")
            continue
        sizes = row["bytes_per_device"]
        numbers = (sizes["arguments"], sizes["peak"], row["beside_bytes"], row["total_bytes"])
        cells = "".join(f"{n / 1e9:>{w}.2f}" for n, w in zip(numbers, (10, 8, 8, 8), strict=True))
        fits = "" if row["fits"] else "  does not fit"
        lines.append(f"  {row['name']:38}{cells}{row['compile_seconds']:9.0f}{fits}")
    lines.append(f"{'a host':30}{'times':>10}{'GB':>10}{'seconds':>9}{'GB held':>9}  how")
    for row in rehearsal["host"]:
        fits = "" if row["fits"] else f" does not fit {_gb(row['memory_limit_bytes'])};"
        lines.append(
            f"  {row['name']:28}{row['times']:>10,}{row['bytes'] / 1e9:>10.3g}"
            f"{row['seconds']:>9.3g}{row['memory_bytes'] / 1e9:>9.3g} {fits} {row['how']}"
        )
    lines.append("all of it fits" if rehearsal["fits"] else "NOT ALL OF IT FITS")
    return lines


def _mesh(plan: dict[str, Any]) -> str:
    return " ".join(f"{axis}={n}" for axis, n in plan["mesh"].items() if n > 1) or "one device"


def _gb(size: float) -> str:
    return f"{_short(size / 1e9)} GB"


def _short(value: float) -> str:
    """One digit behind the point, three digits of small numbers."""
    return f"{value:.3g}" if 0 < value < 10 else f"{value:,.1f}"


def _cost(plan: dict[str, float]) -> str:
    return (
        f"{plan['hours']:,.1f} hours, {plan['chip_hours']:,.1f} chip hours,"
        f" ${plan['dollars']:,.2f}, {plan['kwh']:,.1f} kWh"
    )
