"""Plots as SVG text: lines over steps, and heat maps. Colours are the page's CSS variables."""

import base64
import dataclasses
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from html import escape

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34
# Ours: dark blue over teal and yellow to orange, readable on white and on black.
RAMP = (
    (38, 48, 110),
    (32, 112, 142),
    (46, 164, 121),
    (183, 201, 60),
    (253, 196, 47),
    (232, 93, 36),
)
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    dots: bool = False  # few values, each marked


def short(value: float) -> str:
    """A number in a few characters: 0.0034, 12.5, 3.2M."""
    size = abs(value)
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within low..high, about `count`."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten within low..high; with 2 and 5 times those where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for parts in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [m * 10.0**k for k in range(first, last + 1) for m in parts]
        found = [value for value in found if low <= value <= high]
        if len(found) > 2:
            break
    return found[:: max(1, math.ceil(len(found) / 6))]


def plot(
    lines: Sequence[Line],
    steps: Point,
    *,
    log: bool = False,
    level: tuple[float, str] | None = None,
    marks: Iterable[tuple[float, str, str]] = (),
    zero: bool = False,
) -> str:
    """Curves over steps.

    Args:
        lines: at most four; colours c1 to c4.
        steps: the first and last that the axis has.
        log: logarithmic values, where all are positive.
        level: a horizontal line with its label.
        marks: vertical ones: step, CSS class, tooltip.
        zero: the axis begins at 0.
    """
    values = [value for line in lines for _, value in line.points]
    log = log and min(values) > 0
    low, high = _range(values, zero, log)
    if level and low <= level[0] <= high + 2 * (high - low):  # a far level would flatten the curve
        high = max(high, level[0] + 0.06 * (high - low))
    scale = math.log10 if log else float
    x = _axis(steps[0], max(steps[1], steps[0] + 1), LEFT, WIDTH - RIGHT)
    rise = _axis(scale(low), scale(high), HEIGHT - BOTTOM, TOP)

    def y(v):
        return rise(scale(v))

    parts = []
    for tick in _powers(low, high) if log else ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}"'
            f' y2="{y(tick):.1f}"/>'
        )
        parts.append(_text(LEFT - 7, y(tick) + 4, short(tick), "end"))
    parts += _steps_axis(steps, x)
    for step, kind, text in marks:
        parts.append(
            f'<line class="mark {kind}" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}"'
            f' y2="{HEIGHT - BOTTOM}"><title>{escape(text)}</title></line>'
        )
    if level and low <= level[0] <= high:
        at = y(level[0])
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(_text(WIDTH - RIGHT - 4, at - 5, level[1], "end", "levelname"))
    for number, line in enumerate(lines, 1):
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line.points)
        parts.append(f'<polyline class="c{number}" points="{path}"/>')
        if line.dots or len(line.points) == 1:
            parts += [
                f'<circle class="f{number}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3">'
                f"<title>step {s:g}: {v:.5g}</title></circle>"
                for s, v in line.points
            ]
    return _svg("".join(parts), HEIGHT)


def _range(values: list[float], zero: bool, log: bool) -> Point:
    low, high = min(values), max(values)
    if zero:
        return 0.0, high * 1.06 or 1.0
    if log:
        return low / 1.15, high * 1.15
    room = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return low - room, high + room


def heat(
    rows: Sequence[Sequence[float]], *, top: float, label: str, across: Callable, low: float = 0.0
) -> str:
    """A heat map: one row a layer, the first on top, and the scale of colours from `low` to `top`.

    Args:
        rows: values; NaN is left empty.
        top: value of the last colour.
        label: of the vertical axis.
        across: from the mapping of positions 0..1 to x, the parts of the horizontal axis.
        low: value of the first colour.
    """
    each = max(4.0, min(18.0, 300 / len(rows)), 84 / len(rows))  # room for the axis's name
    height = TOP + each * len(rows) + BOTTOM
    right = WIDTH - RIGHT - 56
    parts = [
        f'<image x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{each * len(rows):.1f}"'
        f' preserveAspectRatio="none" href="{_png(rows, low, top)}"/>'
    ]
    for k in sorted({round(t) for t in ticks(0, len(rows) - 1, min(6, len(rows)))}):
        parts.append(_text(LEFT - 7, TOP + each * (k + 0.5) + 4, str(k), "end"))
    middle = TOP + each * len(rows) / 2
    parts.append(
        f'<text class="axis" x="14" y="{middle:.1f}" text-anchor="middle"'
        f' transform="rotate(-90 14 {middle:.1f})">{escape(label)}</text>'
    )
    parts += across(_axis(0, 1, LEFT, right), height)
    bar = [[1 - k / 63] for k in range(64)]
    parts.append(
        f'<image x="{right + 8}" y="{TOP}" width="9" height="{each * len(rows):.1f}"'
        f' preserveAspectRatio="none" href="{_png(bar, 0, 1)}"/>'
    )
    parts.append(_text(right + 21, TOP + 9, short(top), "start"))
    parts.append(_text(right + 21, TOP + each * len(rows), short(low), "start"))
    return _svg("".join(parts), height)


def steps_across(steps: Point) -> Callable:
    """The horizontal axis of a heat map over steps."""

    def parts(x: Callable[[float], float], height: float) -> list[str]:
        span = max(steps[1] - steps[0], 1)
        return _steps_axis(steps, lambda step: x((step - steps[0]) / span), height)

    return parts


def count_across(count: int, label: str) -> Callable:
    """The horizontal axis of a heat map over `count` things, numbered from 0."""

    def parts(x: Callable[[float], float], height: float) -> list[str]:
        found = [
            _text(x((k + 0.5) / count), height - 18, str(k), "middle")
            for k in sorted({round(t) for t in ticks(0, count - 1, 8)})
        ]
        return [*found, _text(x(0.5), height - 3, label, "middle", "axis")]

    return parts


def _steps_axis(steps: Point, x: Callable[[float], float], height: float = HEIGHT) -> list[str]:
    found = [
        _text(x(t), height - 18, f"{t:,.0f}", "middle") for t in ticks(*steps, 6) if t == round(t)
    ]
    return [*found, _text((x(steps[0]) + x(steps[1])) / 2, height - 3, "step", "middle", "axis")]


def _axis(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    return lambda value: first + (value - low) / ((high - low) or 1) * (last - first)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(content: str, height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{content}</svg>'


def _colour(share: float) -> bytes:
    if math.isnan(share):
        return b"\0\0\0\0"
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    k = min(int(place), len(RAMP) - 2)
    mix = (round(a + (b - a) * (place - k)) for a, b in zip(RAMP[k], RAMP[k + 1], strict=True))
    return bytes((*mix, 255))


def _png(rows: Sequence[Sequence[float]], low: float, top: float) -> str:
    """One pixel a value, as a data URI: kilobytes where rectangles would take megabytes."""
    table = [_colour(k / 255) for k in range(256)]
    span = (top - low) or 1.0

    def pixel(value: float) -> bytes:
        share = (value - low) / span
        return _colour(share) if math.isnan(share) else table[round(min(max(share, 0), 1) * 255)]

    raw = b"".join(b"\0" + b"".join(map(pixel, row)) for row in rows)
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 6, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()
