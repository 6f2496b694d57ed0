"""The page of an evaluation: scores, counts, and samples to read. One file, nothing loaded."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from k2jax.evals.ledger import Record, read_ledger
from k2jax.evals.task import PASSED
from k2jax.report.page import STYLE
from k2jax.report.svg import short
from k2jax.runtime.files import write_atomic

SHOWN = 200  # samples that can be unfolded, those that did not pass first
LENGTH = 4_000  # characters of a text
BARS = """
.bars{background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:13px 16px}
.bar{display:grid;grid-template-columns:130px 1fr 90px;gap:12px;align-items:center;margin:5px 0}
.bar i{display:block;height:12px;border-radius:3px;background:var(--bad)}
.bar.passed i{background:var(--c3)}.bar.truncated i,.bar.unparsed i{background:var(--warn)}
.bar.scored i{background:var(--c1)}.bar b{font-weight:500;text-align:right;
font-variant-numeric:tabular-nums}
.sample{background:var(--panel);border:1px solid var(--line);border-radius:10px;margin:8px 0;
padding:7px 13px}.sample pre{border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere}
.tag{display:inline-block;min-width:92px;color:var(--bad)}.tag.passed{color:var(--c3)}
.tag.truncated,.tag.unparsed{color:var(--warn)}.tag.scored{color:var(--c1)}
"""


def write_page(ledger: Path, numbers: Mapping[str, Any]) -> Path:
    """Write the page of a ledger beside it; where it is.

    Args:
        ledger: finished.
        numbers: of the task, as `k2jax evaluate` writes them.

    Raises:
        ConfigError: the ledger cannot be read.
    """
    header, records = read_ledger(ledger)
    target = ledger.with_suffix(".html")
    write_atomic(target, evaluation_page(header, records, numbers))
    return target


def evaluation_page(
    header: Mapping[str, Any], records: Sequence[Record], numbers: Mapping[str, Any]
) -> str:
    """The HTML."""
    name = escape(str(header["task"]))
    where = escape(str(numbers.get("checkpoint", "")))
    body = "\n".join(
        [
            f"<h1>{name}</h1><p class='sub'>{where}, weights {escape(str(header['weights']))}</p>",
            _facts(numbers),
            "<h2>What became of the samples</h2>",
            _bars(numbers.get("results", {})),
            *_samples(records),
            "<details><summary>What the scores depend on</summary>"
            f"<pre>{escape(json.dumps(header, indent=1))}</pre></details>",
        ]
    )
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{name}</title>"
    )
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}{BARS}</style></head>"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _facts(numbers: Mapping[str, Any]) -> str:
    cells = []
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name.endswith(("_low", "_high")):
            continue
        shown = f"{value:.4f}" if isinstance(value, float) and abs(value) < 100 else short(value)
        if f"{name}_low" in numbers:
            shown += f" ({numbers[f'{name}_low']:.3f} to {numbers[f'{name}_high']:.3f})"
        label = escape(name.replace("_", " "))
        cells.append(f"<div><span>{label}</span><b>{escape(shown)}</b></div>")
    return f"<div class='facts'>{''.join(cells)}</div>"


def _bars(results: Mapping[str, int]) -> str:
    total = max(sum(results.values()), 1)
    rows = [
        f"<div class='bar {escape(name.split()[0])}'><span>{escape(name)}</span>"
        f"<i style='width:{100 * count / total:.2f}%'></i><b>{count:,}</b></div>"
        for name, count in sorted(results.items(), key=lambda pair: -pair[1])
    ]
    return f"<div class='bars'>{''.join(rows)}</div>"


def _samples(records: Sequence[Record]) -> list[str]:
    judged = [record for record in records if "score" in record]
    ordered = sorted(judged, key=lambda record: record["result"] == PASSED)[:SHOWN]
    left = len(judged) - len(ordered)
    more = [f"<p class='sub'>{left:,} more are in the ledger.</p>"] if left else []
    return ["<h2>Samples</h2>", *map(_sample, ordered), *more]


def _sample(record: Record) -> str:
    result = escape(record["result"])
    summary = (
        f"<span class='tag {result.split()[0]}'>{result}</span> {escape(record['item'])}"
        f" #{record['sample']}"
    )
    parts = [
        f"<p class='sub'>{escape(title)}</p><pre>{escape(text[:LENGTH])}</pre>"
        for title, text in (
            *((_describe(part), part["text"]) for part in record["parts"] if "text" in part),
            ("taken from the answer", record["extracted"]),
            ("why", record["reason"]),
        )
        if text
    ]
    if record["parts"] and "text" not in record["parts"][0]:
        parts.append(_scores(record["parts"]))
    return f"<details class='sample'><summary>{summary}</summary>{''.join(parts)}</details>"


def _describe(part: Mapping[str, Any]) -> str:
    tokens, total = len(part["ids"]), sum(part["logprobs"])
    return f"{tokens} tokens, {total:.2f} nats, ended by {part['end']}; prompt {part['prompt']}"


def _scores(parts: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td class='n'>{number}</td><td class='n'>{len(part['ids'])}</td>"
        f"<td class='n'>{sum(part['logprobs']):.4f}</td>"
        f"<td>{'greedy' if part['is_greedy'] else ''}</td></tr>"
        for number, part in enumerate(parts)
    )
    return (
        "<div class='scroll'><table><tr><th>request</th><th>tokens</th><th>nats</th><th></th></tr>"
        f"{rows}</table></div>"
    )
