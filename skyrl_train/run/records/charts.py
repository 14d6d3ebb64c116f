"""Line charts and stacked bars as inline SVG. Colours come from the page's style sheet; hover texts from `data-tip`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")
Point = tuple[float, float]  # (step, value); points that are not finite are left out
MAX_POINTS = 300  # a longer series is thinned, so that the page stays small


@dataclass(frozen=True)
class Chart:
    """The data of a chart. line: one value per step. band: (step, low, high). dots: points joined by a thin line."""

    title: str
    line: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()
    dots: Sequence[Point] = ()
    line_name: str = "train"
    dots_name: str = "evaluation"
    width: int = 860
    height: int = 300
    bounds: tuple[float, float] | None = None  # of y; None: from the data


@dataclass(frozen=True)
class _Frame:
    """Maps data to pixels."""

    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]
    left: int = 46
    right: int = 14
    top: int = 12
    bottom: int = 28
    ticks_y: list[float] = field(default_factory=list)

    def px(self, step: float) -> float:
        low, high = self.x
        return round(self.left + (step - low) / (high - low) * (self.width - self.left - self.right), 1)

    def py(self, value: float) -> float:
        low, high = self.y
        return round(
            self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom), 1
        )

    def path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{'M' if i == 0 else 'L'}{self.px(x)} {self.py(y)}" for i, (x, y) in enumerate(points))


def line_chart(chart: Chart) -> str:
    """Return the chart as one `<svg>`, or "" if it has no finite point."""
    line = thinned([(x, y) for x, y in chart.line if math.isfinite(y)])
    band = thinned([(x, a, b) for x, a, b in chart.band if math.isfinite(a) and math.isfinite(b)])
    dots = thinned([(x, y) for x, y in chart.dots if math.isfinite(y)])
    if not line and not dots:
        return ""
    values = [y for _, y in (*line, *dots)] + [y for _, *pair in band for y in pair]
    frame = _frame(chart, [x for x, *_ in (*line, *band, *dots)], values)
    parts = [_axes(frame)]
    if band:
        edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        parts.append(f'<path class="band" d="{frame.path(edge)} Z"/>')
    if dots:
        parts.append(f'<path class="dots-line" d="{frame.path(dots)}"/>')
    parts.append(f'<path class="line" d="{frame.path(line)}"/>')
    if len(line) == 1:
        parts.append(f'<circle class="line-dot" cx="{frame.px(line[0][0])}" cy="{frame.py(line[0][1])}" r="3"/>')
    parts += [f'<circle class="dot" cx="{frame.px(x)}" cy="{frame.py(y)}" r="4.5"/>' for x, y in dots]
    parts.append(_hover(frame, _tips(chart, line, band, dots)))
    return _svg(chart.width, chart.height, chart.title, "".join(parts))


def stacked_bars(
    title: str, steps: Sequence[float], parts: Mapping[str, Sequence[float]], size: tuple[int, int]
) -> str:
    """Return a chart with a bar of shares per step; parts: CSS class -> count per step, drawn from the bottom up."""
    width, height = size
    totals = [sum(counts) for counts in zip(*parts.values(), strict=True)]
    rows = thinned([(step, i) for i, (step, total) in enumerate(zip(steps, totals, strict=True)) if total > 0])
    if not rows:
        return ""
    span = (rows[0][0] - 0.5, rows[-1][0] + 0.5)
    frame = _Frame(width, height, span, (0.0, 1.0), ticks_y=[0.0, 0.5, 1.0])
    bar = max(1.0, (width - frame.left - frame.right) / max(len(rows), 1) * 0.82)
    drawn = [_axes(frame, percent=True)]
    tips = []
    for step, i in rows:
        floor, words = 0.0, [f"step {step:g}"]
        for name, counts in parts.items():
            share = counts[i] / totals[i]
            if share:
                y = frame.py(floor + share)
                x, tall = round(frame.px(step) - bar / 2, 1), round(frame.py(floor) - y, 1)
                drawn.append(f'<rect class="end-{escape(name)}" x="{x}" y="{y}" width="{bar:.1f}" height="{tall}"/>')
                words.append(f"{name.replace('_', ' ')}: {counts[i]:g} ({share:.0%})")
            floor += share
        tips.append((step, "\n".join(words)))
    drawn.append(_hover(frame, tips))
    return _svg(width, height, title, "".join(drawn))


def thinned(items: list[T]) -> list[T]:
    """Return at most MAX_POINTS of the items, evenly spread, the first and the last among them."""
    if len(items) <= MAX_POINTS:
        return items
    last = len(items) - 1
    return [items[round(i * last / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers, 1, 2, 2.5 or 5 times a power of ten apart, that cover [low, high]."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.7)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _frame(chart: Chart, steps: list[float], values: list[float]) -> _Frame:
    low, high = chart.bounds or (min(values), max(values))
    low, high = min(low, *values), max(high, *values)
    if low == high:
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0.0, 1.0)
    ticks = nice_ticks(low, high, 5 if chart.height > 200 else 3)
    span = (min(steps), max(steps))
    if span[0] == span[1]:
        span = (span[0] - 1, span[1] + 1)
    return _Frame(chart.width, chart.height, span, (ticks[0], ticks[-1]), ticks_y=ticks)


def _axes(frame: _Frame, percent: bool = False) -> str:
    parts = []
    right, floor = frame.width - frame.right, frame.height - frame.bottom
    for value in frame.ticks_y:
        y = frame.py(value)
        label = f"{value:.0%}" if percent else _short(value)
        parts.append(f'<path class="grid" d="M{frame.left} {y}H{right}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 8}" y="{y + 4}" text-anchor="end">{label}</text>')
    low, high = frame.x
    wanted = 8 if frame.width > 500 else 4
    ticks = nice_ticks(low, high, min(wanted, max(1, int(high - low))))
    for step in ticks:
        if low <= step <= high and step == int(step):
            parts.append(
                f'<text class="tick" x="{frame.px(step)}" y="{floor + 18}" text-anchor="middle">{step:g}</text>'
            )
    return "".join(parts)


def _hover(frame: _Frame, tips: Sequence[tuple[float, str]]) -> str:
    """Return an invisible column per step that shows a text and a thin line when the mouse is over it."""
    middles = [frame.px(step) for step, _ in tips]
    edges = [frame.left, *((a + b) / 2 for a, b in pairwise(middles)), frame.width - frame.right]
    parts = []
    for i, (_, words) in enumerate(tips):
        left, wide = edges[i], max(edges[i + 1] - edges[i], 0.5)
        area = f'x="{left:.1f}" y="{frame.top}" width="{wide:.1f}" height="{frame.height - frame.top - frame.bottom}"'
        hair = f'<path class="hair" d="M{middles[i]} {frame.top}V{frame.height - frame.bottom}"/>'
        parts.append(f'<g class="hit"><rect {area} data-tip="{escape(words)}"/>{hair}</g>')
    return "".join(parts)


def _tips(
    chart: Chart, line: Sequence[Point], band: Sequence[tuple[float, float, float]], dots: Sequence[Point]
) -> list[tuple[float, str]]:
    words: dict[float, list[str]] = {}
    for x, y in line:
        words.setdefault(x, []).append(f"{chart.line_name} {_exact(y)}")
    for x, low, high in band:
        words.setdefault(x, []).append(f"from {_exact(low)} to {_exact(high)}")
    for x, y in dots:
        words.setdefault(x, []).append(f"{chart.dots_name} {_exact(y)}")
    return [(x, "\n".join([f"step {x:g}", *words[x]])) for x in sorted(words)]


def _svg(width: int, height: int, title: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{content}</svg>'
    )


def _short(value: float) -> str:
    """Return a short label: 12000 -> "12k"; 0.30000000000000004 -> "0.3"."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2g}"


def _exact(value: float) -> str:
    return f"{value:.4g}"
