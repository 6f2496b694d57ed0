"""The page of a run: of any length and age, whatever its last line looks like, without jax."""

import base64
import dataclasses
import json
import math
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import pytest

from k2jax import cli, configs
from k2jax.config import to_json
from k2jax.report import report, svg
from k2jax.report.read import POINTS, read

RUN = configs.load("tiny")
MOE, EXPERTS, LAYERS = RUN.model.moe_layers, RUN.model.experts, RUN.model.layers


def line(step: int, **values) -> dict:
    """What the loop writes of a step."""
    return {
        "step": step, "learning_rate": 1e-3, "loss": 8 / step**0.2, "aux_loss": 1.1,
        "grad_norm": 3.0 / step, "update_norm": 2.0, "update_rms": 1e-4,
        "logit_max": 0.1 * step, "logit_max_layers": [0.1 * step] * LAYERS, "clipped": 0.0,
        "clipped_layers": [0.0] * LAYERS, "load_max": 1.5, "load_entropy": 0.98, "skipped": 0.0,
        "expert_load": [[100 + e for e in range(EXPERTS)]] * MOE, "seconds": 1.0,
        "input_seconds": 0.01, "tokens_per_second": 2000.0, "flops_per_second": 1e10,
        "host_bytes": 2_000_000_000,
    } | values  # fmt: skip


def recorded(folder: Path, lines, events=(), run=RUN) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    if events:
        text = "".join(f"{json.dumps(one)}\n" for one in events)
        (folder / "events.jsonl").write_text(text)
    (folder / "config.json").write_text(json.dumps(to_json(run)))
    return folder


def figures(page: Path) -> dict[str, ET.Element]:
    """The plots of a page by title; each is well-formed."""
    found = re.findall(r"<h3>(.*?)(?:<b>.*?)?</h3>.*?(<svg.*?</svg>)", page.read_text(), re.S)
    return {title: ET.fromstring(picture) for title, picture in found}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    lines = [line(step) for step in range(1, 51)]
    for step in (25, 50):
        lines[step - 1] |= {"heldout_loss": 5.0, "heldout_bits_per_byte": 2.5}
    lines[29] |= {"loss": None, "grad_norm": None, "skipped": 1.0}
    events = [
        {"step": 30, "event": "skipped", "time": 1.0, "loss": None, "limit": 6.2, "batch": 29},
        {"step": 40, "event": "rewound", "time": 2.0, "to": 36, "left_out": [36, 39]},
    ]
    return report(recorded(tmp_path_factory.mktemp("runs") / "run", lines, events))


def test_every_recorded_value_has_its_plot(page):
    titles = [
        "Loss (nats per target)", "Held-out bits per byte", "Learning rate", "Norms",
        "Largest attention logit (tau 100)", "Clipped heads (share)",
        "Busiest expert over the mean", "Entropy of the expert load (1: even)", "Tokens a second",
        "Wait for input (seconds a step)", "Host memory (bytes)",
        "Largest attention logit by layer", "Clipped heads by layer",
        "Expert load over its layer&#x27;s mean, last recorded",
    ]  # fmt: skip
    found = figures(page)
    assert set(titles) <= set(found)
    loss = found[titles[0]]
    assert len(loss.findall(".//polyline")) == 2
    assert len(loss.findall(".//circle")) == 2
    assert [mark.get("class") for mark in loss.findall(".//line[@class]")][-2:] == [
        "mark skipped", "mark rewound",
    ]  # fmt: skip
    for picture in found.values():
        width, height = map(float, picture.get("viewBox").split()[2:])
        for text in picture.findall(".//text"):
            assert 0 <= float(text.get("x")) <= width
            assert 0 <= float(text.get("y")) <= height


def test_the_page_says_what_the_run_is_and_how_it_stands(page):
    text = page.read_text()
    for part in ("tiny", "50 of 150", "at step 50", "26.", "parameters", "expert=2",
                 "8 x 256 tokens", "102k", "1 skipped, 1 rewound", "left out 36 to 39",
                 "loss not finite", "optim.tau = 100.0", "2.00 GB"):  # fmt: skip
        assert part in text, part


def test_the_page_needs_nothing_from_outside(page):
    text = page.read_text()
    assert not re.search(r"<script|<link|src=|url\(|@import|https?://", text)
    assert all(uri.startswith("data:image/png") for uri in re.findall(r'href="(.*?)"', text))


@pytest.mark.slow
def test_a_page_of_a_long_run_is_small_and_keeps_every_peak(tmp_path):
    lines = [line(step, loss=2.0, expert_load=[[1, 2]]) for step in range(1, 100_001)]
    lines[54_320]["loss"] = 17.5
    lines[77_001]["loss"] = 0.5
    run = recorded(tmp_path / "run", lines)
    found = read(run)
    assert len(found.series["loss"]) <= 2 * POINTS
    assert (54_321, 17.5) in found.series["loss"]
    assert (77_002, 0.5) in found.series["loss"]
    assert len(found.layers["logit_max_layers"]) <= POINTS
    assert found.layers["logit_max_layers"][-1] == [pytest.approx(10_000)] * LAYERS
    assert report(run).stat().st_size < 1_000_000


def test_a_run_in_progress_with_a_line_cut_off_is_read_up_to_it(tmp_path):
    run = recorded(tmp_path / "run", [line(1), line(2)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    found = read(run)
    assert found.steps == (1, 2)
    assert "at step 2" in report(run).read_text()


def test_a_finished_and_a_stopped_run_are_called_so(tmp_path):
    done = recorded(tmp_path / "done", [line(RUN.train.steps)])
    assert ">finished<" in report(done).read_text()
    event = {"step": 5, "event": "stopped", "loss": None, "file": "replay/step-5.npz"}
    stopped = recorded(tmp_path / "stopped", [line(5, loss=None)], [event])
    assert ">stopped<" in report(stopped).read_text()


def test_metrics_of_an_older_run_without_the_new_keys_or_a_known_config_make_a_page(tmp_path):
    old = ("step", "learning_rate", "loss", "grad_norm", "update_rms", "logit_max", "load_max",
           "seconds")  # fmt: skip
    lines = [{name: line(step)[name] for name in old} for step in (1, 2)]
    run = recorded(tmp_path / "run", lines)
    found = figures(report(run))
    assert "Update RMS" in found
    assert "Norms" in found
    assert "Tokens a second" in found  # from seconds and the config's batch
    (run / "config.json").write_text('{"name": "other", "model": {"width": 3}}')
    assert "Loss (nats per target)" in figures(report(run))


def test_a_value_that_is_no_number_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": "abc"}\n{"step": 2, "loss": 3}\n')
    assert report(tmp_path).exists()


def test_names_from_the_run_are_escaped(tmp_path):
    run = recorded(tmp_path / "run", [line(1)], [{"step": 1, "event": "<b>", "text": "<script>"}],
                   run=dataclasses.replace(RUN, name="<script>x"))  # fmt: skip
    text = report(run).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;x" in text


REFUSED = [
    (lambda folder: None, "no folder {0}"),
    (lambda folder: folder.mkdir(), "{0} has no metrics.jsonl; is it the folder of a run?"),
    (lambda folder: recorded(folder, []), "{0}/metrics.jsonl has no steps yet"),
]


@pytest.mark.parametrize(("make", "says"), REFUSED)
def test_what_has_no_page_is_said_in_one_line(make, says, tmp_path, capsys):
    make(tmp_path / "run")
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"k2jax: {says.format(tmp_path / 'run')}\n"


def test_the_command_says_where_the_page_is_and_loads_no_jax(page, tmp_path):
    code = (
        "import sys; from k2jax.cli import main;"
        f" code = main(['report', {str(page.parent)!r}, '--out', {str(tmp_path / 'p.html')!r}]);"
        " print(code, [m for m in ('jax', 'flax', 'matplotlib') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    where, rest = run.stdout.splitlines()
    assert where.startswith(f"{tmp_path / 'p.html'}: ")
    assert rest == "0 []"


def pixels(uri: str) -> list[list[bytes]]:
    """The PNG of a data URI, as rows of RGBA; every row must be without a filter."""
    data, at, body, size = base64.b64decode(uri.partition(",")[2]), 8, b"", (0, 0)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, part = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + part) == int.from_bytes(data[at + 8 + length : at + 12 + length])
        size = struct.unpack(">II", part[:8]) if kind == b"IHDR" else size
        body += part if kind == b"IDAT" else b""
        at += length + 12
    raw, width = zlib.decompress(body), 4 * size[0] + 1
    rows = [raw[k * width + 1 : (k + 1) * width] for k in range(size[1])]
    return [[row[k : k + 4] for k in range(0, len(row), 4)] for row in rows]


def test_a_heat_map_has_a_pixel_a_value_and_nothing_where_there_is_none():
    found = pixels(svg._png([[0.0, 5.0, math.nan], [10.0, 99.0, -1.0]], 0.0, 10.0))
    first, last = (bytes((*svg.RAMP[k], 255)) for k in (0, -1))
    assert found[0][0] == found[1][2] == first
    assert found[1][0] == found[1][1] == last
    assert found[0][1] not in (first, last)
    assert found[0][2] == b"\0\0\0\0"


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1.2e-5, 9e-5), (3, 3.0001), (-5, 120), (0, 8e12)]
)
def test_ticks_are_round_and_within(low, high):
    found = svg.ticks(low, high)
    assert 3 <= len(found) <= 7
    assert all(low - 1e-9 * high <= tick <= high * (1 + 1e-9) for tick in found)


def test_short_numbers_are_short():
    numbers = {0: "0", 12.345: "12.35", 0.0002: "2.0e-04", 20_481_000: "20.5M", 15_500: "15.5k",
               1e12: "1T", -3: "-3"}  # fmt: skip
    assert {number: svg.short(number) for number in numbers} == numbers


def test_versions_are_those_of_the_last_start(tmp_path):
    folder = recorded(tmp_path / "run", [line(1)])
    starts = [{"versions": {"jax": v}, "device": "cpu"} for v in ("0.10.1", "0.10.2")]
    (folder / "run.json").write_text(json.dumps(starts))
    assert read(folder).versions == {"jax": "0.10.2", "device": "cpu"}
