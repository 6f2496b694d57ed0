"""The page of a run: header, plots, events, last values. One file, nothing loaded from outside."""

import math
import time
from html import escape
from typing import Any

from k2jax.params.counts import count_parameters
from k2jax.report import svg
from k2jax.report.read import RunRecord
from k2jax.report.svg import Line, short

# Title, (key, label) of each curve, options: log, zero, dots for the second curve.
CURVES: tuple[tuple[str, tuple[tuple[str, str], ...], dict[str, Any]], ...] = (
    ("Loss (nats per target)", (("loss", "training"), ("heldout_loss", "held out")), {}),
    ("Held-out bits per byte", (("heldout_bits_per_byte", "held out"),), {}),
    ("Learning rate", (("learning_rate", "learning rate"),), {"zero": True}),
    ("Norms", (("grad_norm", "gradient"), ("update_norm", "update")), {"log": True}),
    ("Update RMS", (("update_rms", "update"),), {"log": True}),
    ("Largest attention logit", (("logit_max", "largest of all heads"),), {}),
    ("Clipped heads (share)", (("clipped", "above tau"),), {"zero": True}),
    ("Busiest expert over the mean", (("load_max", "mean over layers"),), {"zero": True}),
    ("Entropy of the expert load (1: even)", (("load_entropy", "mean over layers"),), {}),
    ("Dropped choices (share)", (("dropped", "dropped"),), {"zero": True}),
    ("Loss of MTP layers", (("mtp_loss", "MTP"),), {}),
    ("Tokens a second", (("tokens_per_second", "tokens a second"),), {"zero": True}),
    ("Model FLOPs utilisation", (("mfu", "MFU"),), {"zero": True}),
    ("Model FLOPs a second", (("flops_per_second", "FLOP/s"),), {"zero": True}),
    ("Wait for input (seconds a step)", (("input_seconds", "wait"),), {"zero": True}),
    ("Host memory (bytes)", (("host_bytes", "resident"),), {"zero": True}),
)
REPLACED = {"Update RMS": "update_norm", "Model FLOPs a second": "mfu"}  # shown only without it
DOTTED = ("heldout_loss", "heldout_bits_per_byte")
HEATS = (
    ("Largest attention logit by layer", "logit_max_layers"),
    ("Clipped heads by layer", "clipped_layers"),
    ("Busiest expert over the mean by layer", "load_max_layers"),
)
BAD = ("spike", "skipped", "rewound", "stopped")
SHOWN_EVENTS = 200
STYLE = """
:root{--bg:#f6f7f9;--panel:#fff;--ink:#1b2028;--muted:#5f6b7a;--grid:#e5e8ed;--line:#dfe3e8;
--c1:#2563eb;--c2:#d9480f;--c3:#0a8f6a;--c4:#8b46d6;--bad:#c92a2a;--warn:#e8890c}
@media(prefers-color-scheme:dark){:root{--bg:#0f1216;--panel:#171b21;--ink:#e6e9ee;
--muted:#98a3b3;--grid:#262c35;--line:#2a313b;--c1:#6ea8fe;--c2:#ff9466;--c3:#4fd1a5;--c4:#c29bff;
--bad:#ff7b7b;--warn:#ffb454}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 2px;letter-spacing:-.01em}h2{font-size:18px;margin:34px 0 12px}
h3{font-size:14px;font-weight:600;margin:0;display:flex;justify-content:space-between;gap:12px}
h3 b{font-variant-numeric:tabular-nums;color:var(--muted);font-weight:500}
.sub{color:var(--muted);margin:0 0 18px}.state{display:inline-block;padding:1px 10px;
border-radius:99px;border:1px solid currentColor;font-size:13px;margin-left:10px;vertical-align:4px}
.finished{color:var(--c3)}.going{color:var(--c1)}.stopped{color:var(--bad)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:10px}
.facts div{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:9px 13px}
.facts span{display:block;color:var(--muted);font-size:12.5px}.facts b{font-weight:600;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:14px}
figure{margin:0;background:var(--panel);border:1px solid var(--line);border-radius:12px;
padding:13px 14px 8px}svg{display:block;width:100%;height:auto;margin-top:6px}
svg text{fill:var(--muted);font:11.5px system-ui,sans-serif;font-variant-numeric:tabular-nums}
svg text.axis{font-size:12px}svg text.levelname{fill:var(--bad)}
svg .grid{stroke:var(--grid);stroke-width:1}svg image{image-rendering:pixelated}
polyline{fill:none;stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}
.level{stroke:var(--bad);stroke-width:1.3;stroke-dasharray:5 4}
.mark{stroke-width:1.5;opacity:.75;stroke:var(--warn)}.mark.skipped,.mark.stopped{stroke:var(--bad)}
.mark.rewound{stroke:var(--c4)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}
.c4{stroke:var(--c4)}.f1{fill:var(--c1)}.f2{fill:var(--c2)}.key{font-size:12.5px;
color:var(--muted);margin-top:2px}.key i{display:inline-block;width:14px;height:3px;
border-radius:2px;margin:0 5px 3px 0;vertical-align:middle}.key span{margin-right:14px}
.k1{background:var(--c1)}.k2{background:var(--c2)}
table{border-collapse:collapse;width:100%;background:var(--panel);border:1px solid var(--line);
border-radius:12px;overflow:hidden;font-size:14px}th,td{text-align:left;padding:6px 13px;
border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}th{color:var(--muted);
font-weight:500;font-size:12.5px}tr:last-child td{border-bottom:0}td.n{text-align:right}
.scroll{overflow-x:auto}details{margin-top:14px}summary{cursor:pointer;color:var(--muted)}
pre{background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:12px;
overflow:auto;font-size:12.5px}
"""


def page(found: RunRecord) -> str:
    """The HTML."""
    name = escape(found.name)
    state, kind = _state(found)
    parts = [
        f"<h1>{name}<span class='state {kind}'>{state}</span></h1>",
        f"<p class='sub'>{escape(_summary(found))}</p>",
        _facts(found),
        "<h2>Curves</h2><div class='grid'>",
        *_curves(found),
        "</div>",
        *_heats(found),
        _events(found),
        _table(found),
        _versions(found),
    ]
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{name}</title>"
    )
    body = "\n".join(part for part in parts if part)
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head>"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _state(found: RunRecord) -> tuple[str, str]:
    """Words and CSS class for how the run stands."""
    last = found.steps[1]
    if found.config and last >= found.config.train.steps:
        return "finished", "finished"
    # A run that went on writes metrics after its event.
    written = time.time() - found.age - 1
    ends = [e for e in found.events if e.get("event") == "stopped" and e["step"] >= last]
    if any(e.get("time", written) >= written for e in ends):
        return "stopped", "stopped"
    return f"at step {last:,}, {_ago(found.age)} ago", "going"


def _ago(seconds: float) -> str:
    for limit, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * limit:
            return f"{seconds / limit:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _summary(found: RunRecord) -> str:
    run = found.config
    if run is None:
        return f"{found.folder}"
    m = run.model
    counted = count_parameters(m)
    total = counted["total_parameters"] + counted["mtp_parameters"]
    working = counted["active_matmul_parameters_with_head"]
    working += counted["mtp_active_matmul_parameters"]
    return (
        f"{short(total)} parameters, {short(working)} at work on a token; {m.dense_layers} dense +"
        f" {m.moe_layers} mixture layers, {m.experts} experts, {m.experts_per_token} a token;"
        f" {run.optim.name}; {run.train.dtype}; {found.folder}"
    )


def _facts(found: RunRecord) -> str:
    run, last = found.config, found.last
    facts: list[tuple[str, str]] = [("steps", f"{found.steps[1]:,}")]
    if run:
        tokens = run.data.rows * run.data.context
        facts = [
            ("steps", f"{found.steps[1]:,} of {run.train.steps:,}"),
            ("tokens seen", short(found.steps[1] * tokens)),
            ("batch", f"{run.data.rows:,} x {run.data.context:,} tokens"),
            ("mesh", str(run.mesh)),
        ]
    for key, label in (
        ("loss", "training loss"),
        ("heldout_loss", "held-out loss"),
        ("heldout_bits_per_byte", "bits per byte"),
        ("tokens_per_second", "tokens a second"),
        ("mfu", "MFU"),
        ("host_bytes", "host memory"),
    ):
        if key in last:
            facts.append((label, _value(key, last[key])))
    kinds = [e.get("event") for e in found.events]
    counts = [f"{kinds.count(kind)} {kind}" for kind in BAD if kind in kinds]
    facts.append(("events", ", ".join(counts) or "none"))
    cells = (f"<div><span>{escape(k)}</span><b>{escape(v)}</b></div>" for k, v in facts)
    return f"<div class='facts'>{''.join(cells)}</div>"


def _value(key: str, value: float) -> str:
    if key == "mfu":
        return f"{100 * value:.1f}%"
    return f"{value / 1e9:.2f} GB" if key == "host_bytes" else short(value)


def _curves(found: RunRecord) -> list[str]:
    figures = []
    for title, curves, options in CURVES:
        if REPLACED.get(title) in found.series:
            continue
        lines = [
            Line(label, found.series[key], dots=key in DOTTED)
            for key, label in curves
            if found.series.get(key)
        ]
        if not lines:
            continue
        extra, above = dict(options), ""
        if title.startswith("Loss (") and found.events:
            extra["marks"] = _marks(found)
        tau = found.config.optim.tau if found.config else None
        if tau and title == "Largest attention logit" and "clipped" in found.series:
            extra["level"] = (tau, f"tau {tau:g}")
            if tau > max(v for _, v in lines[0].points):
                above = f" (tau {tau:g})"
        newest = found.last[next(key for key, _ in curves if key in found.series)]
        key = _key([line.label for line in lines]) if len(curves) > 1 else ""
        picture = svg.plot(lines, found.steps, **extra)
        figures.append(_figure(title + above, picture, short(newest), key))
    return figures


def _figure(title: str, picture: str, newest: str = "", key: str = "") -> str:
    shown = f"<b>{escape(newest)}</b>" if newest else ""
    return f"<figure><h3>{escape(title)}{shown}</h3>{key}{picture}</figure>"


def _key(labels: list[str]) -> str:
    spans = (f"<span><i class='k{k}'></i>{escape(text)}</span>" for k, text in enumerate(labels, 1))
    return f"<div class='key'>{''.join(spans)}</div>"


def _marks(found: RunRecord) -> list[tuple[float, str, str]]:
    """Steps at which something happened, at most one mark for each step."""
    marks = {
        e["step"]: (e["step"], e["event"], f"step {e['step']}: {e['event']}")
        for e in found.events
        if e.get("event") in BAD and found.steps[0] <= e["step"] <= found.steps[1]
    }
    return list(marks.values())[-SHOWN_EVENTS:]


def _heats(found: RunRecord) -> list[str]:
    figures = []
    for title, key in HEATS:
        rows = found.layers.get(key)
        if rows and len({len(row) for row in rows}) == 1:
            by_layer = list(zip(*rows, strict=True))
            known = [v for row in by_layer for v in row if not math.isnan(v)]
            if not known:
                continue
            low, top = (0.0, 1.0) if key == "clipped_layers" else (min(known), max(known))
            across = svg.steps_across(found.steps)
            picture = svg.heat(by_layer, top=top, low=low, label="layer", across=across)
            figures.append(_figure(title, picture))
    load = found.last.get("expert_load")
    if load and load[0]:
        means = [sum(row) / len(row) for row in load]
        ratio = [
            [v / mean if mean else 0.0 for v in row] for row, mean in zip(load, means, strict=True)
        ]
        top = max(2.0, *map(max, ratio))
        across = svg.count_across(len(load[0]), "expert")
        picture = svg.heat(ratio, top=top, label="mixture layer", across=across)
        figures.append(_figure("Expert load over its layer's mean, last recorded", picture))
    if not figures:
        return []
    return ["<h2>By layer</h2><div class='grid'>", *figures, "</div>"]


def _events(found: RunRecord) -> str:
    shown = [e for e in found.events if isinstance(e.get("event"), str)]
    if not shown:
        return ""
    rows = []
    for event in shown[-SHOWN_EVENTS:]:
        rest = {k: v for k, v in event.items() if k not in ("step", "event", "time", "host")}
        text = ", ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in rest.items())
        rows.append(
            f"<tr><td class='n'>{event['step']:,}</td><td>{escape(event['event'])}</td>"
            f"<td>{escape(text)}</td></tr>"
        )
    left = len(shown) - len(rows)
    more = f"<p class='sub'>{left:,} earlier ones are in events.jsonl.</p>" if left else ""
    return (
        "<h2>Events</h2><div class='scroll'><table><tr><th>step</th><th>event</th><th></th></tr>"
        f"{''.join(rows)}</table></div>{more}"
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(str, value)) if len(value) == 2 else ", ".join(map(str, value))
    if isinstance(value, float):
        return short(value)
    return "not finite" if value is None else str(value)


def _table(found: RunRecord) -> str:
    rows = []
    for key, points in sorted(found.series.items()):
        if key == "step":
            continue
        values = [value for _, value in points]
        cells = (found.last.get(key, math.nan), min(values), max(values))
        numbers = "".join(f"<td class='n'>{short(float(v))}</td>" for v in cells)
        rows.append(f"<tr><td>{escape(key)}</td>{numbers}</tr>")
    return (
        "<h2>Values</h2><div class='scroll'><table><tr><th>key of metrics.jsonl</th><th>last</th>"
        f"<th>lowest</th><th>highest</th></tr>{''.join(rows)}</table></div>"
    )


def _versions(found: RunRecord) -> str:
    parts = []
    if found.versions:
        text = "\n".join(f"{name} {version}" for name, version in found.versions.items())
        parts.append(f"<details><summary>Versions</summary><pre>{escape(text)}</pre></details>")
    if found.config:
        text = "\n".join(_flat(found.config))
        parts.append(f"<details><summary>Config</summary><pre>{escape(text)}</pre></details>")
    return "".join(parts)


def _flat(node: Any, prefix: str = "") -> list[str]:
    lines = []
    for name, value in vars(node).items():
        if hasattr(value, "__dataclass_fields__"):
            lines += _flat(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} = {value}")
    return lines
