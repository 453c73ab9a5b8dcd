"""What the figures of a report are made of: axes, lines, bars, maps. The template draws them.

A figure is inline SVG that stretches to the width of the page, with its labels as HTML, so that a
page needs no library. `templates/page.js` shows the values under the pointer.
"""

from __future__ import annotations

import math
import struct
import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megashear.report.runs import RecordedRun

Points = tuple[NDArray[Any], NDArray[Any]]
"""Positions on the lower axis, and a value at each."""
Runs = Mapping[str, RecordedRun]
"""Runs by the names that the report gives them."""

# Okabe and Ito's colours, which colour-blind readers tell apart; the last is too pale for lines.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
)
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#000000", "#B8AC1F")
DASHES = ("", "7 3", "2 3", "7 3 2 3")
INK = "#444444"
KEPT, REMOVED, LAYER_REMOVED = (0, 114, 178), (237, 237, 237), (181, 181, 181)  # red, green, blue
WIDTH, HEIGHT = 4000, 1000
"""Units of a figure's area, to which points are rounded."""
MAX_POINTS_AS_DOTS = 12
"""A line with fewer points shows each of them: validation is measured rarely."""


@dataclass(frozen=True)
class Style:
    """How a line is drawn."""

    color: str
    dash: str = ""  # SVG's stroke-dasharray, in pixels
    width: float = 2.0  # pixels
    opacity: float = 1.0


DOTTED = Style(INK, "2 3")


@dataclass(frozen=True, eq=False)
class Line:
    """Values over the axis."""

    name: str
    points: Points
    style: Style
    is_step: bool = False  # each value holds until the next point
    dots: bool = True  # show the points of a short line
    only_dots: bool = False
    is_cut: bool = False  # the axis need not show its highest 1% and lowest 0.5%


@dataclass(frozen=True)
class Axis:
    """The range of an axis and its labels."""

    low: float
    high: float
    ticks: Mapping[float, str]
    title: str = ""
    is_log: bool = False

    def at(self, values: Any) -> NDArray[np.float64]:
        """Return where values stand, from 0 (low) to 1 (high)."""
        scale = np.log if self.is_log else np.asarray
        low, high = float(scale(self.low)), float(scale(self.high))
        return (scale(np.asarray(values, np.float64)) - low) / (high - low)


@dataclass(frozen=True)
class Plot:
    """Lines over one pair of axes."""

    x: Axis
    y: Axis
    lines: Sequence[Line]
    height: int = 210  # pixels
    WIDTH, HEIGHT = WIDTH, HEIGHT  # for the template

    def points(self, line: Line) -> str:
        """Return SVG's points of a line."""
        x = np.rint(WIDTH * self.x.at(line.points[0])).astype(int)
        y = np.rint(HEIGHT * (1 - self.y.at(line.points[1]))).clip(-HEIGHT, 2 * HEIGHT).astype(int)
        if line.is_step and len(x):
            x, y = np.append(np.repeat(x, 2)[1:], WIDTH), np.repeat(y, 2)
        return " ".join(f"{a},{b}" for a, b in zip(x.tolist(), y.tolist(), strict=True))

    def has_dots(self, line: Line) -> bool:
        """Whether each point of a line is shown."""
        return line.only_dots or (line.dots and len(line.points[0]) <= MAX_POINTS_AS_DOTS)


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of one or several pieces, each (color, fraction of the width, text)."""

    name: str
    pieces: Sequence[tuple[str, float, str]]
    text: str = ""
    mark: float | None = None  # a position to mark, as a fraction of the width


@dataclass(frozen=True)
class Map:
    """An image of cells, a row for each layer."""

    image: str  # data URI
    height: int  # pixels
    x: Axis
    rows: int


@dataclass(frozen=True)
class Panel:
    """A figure with its caption, a description for readers who cannot see it, and a legend."""

    title: str
    description: str
    plots: Sequence[Plot] = ()
    bars: Sequence[Bar] = ()
    map: Map | None = None
    keys: Mapping[str, Style] = field(default_factory=dict)


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Give each name a colour, and from the ninth on another dash."""
    return {
        name: Style(COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)])
        for number, name in enumerate(names)
    }


def short(size: float) -> str:
    """A number as 1.35B."""
    for unit, of in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(size) >= of:
            return f"{size / of:.3g}{unit}"
    return f"{size:.3g}"


def linear(low: float, high: float, title: str = "") -> Axis:
    """An axis with three to seven labels at round numbers; equal ends are moved apart."""
    if not high > low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / 7
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [number * step for number in range(first, last + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))

    def label(value: float) -> str:
        if high >= 1e4:
            return short(value)
        return f"{value:.{digits}f}" if digits < 4 else f"{value:g}"

    return Axis(low, high, {value: label(value) for value in values}, title)


def plot(
    lines: Sequence[Line],
    unit: str,
    x_title: str = "",
    *,
    from_zero: bool = False,
    height: int = 210,
) -> Plot:
    """Draw lines over axes that fit them.

    Args:
        lines: at least one, with at least one point.
        unit: of the values.
        x_title: of the lower axis.
        from_zero: whether the values' axis begins at 0.
        height: pixels.
    """
    ends: list[float] = [0.0] if from_zero else []
    for line in lines:
        ends += np.quantile(line.points[1], (0.005, 0.99) if line.is_cut else (0, 1)).tolist()
    margin = 0.05 * (max(ends) - min(ends))
    low = 0.0 if from_zero and min(ends) >= 0 else min(ends) - margin
    steps = np.concatenate([line.points[0] for line in lines])
    x = linear(min(0.0, float(steps.min())), float(steps.max()), x_title)
    return Plot(x, linear(low, max(ends) + margin, unit), lines, height)


def png(colors: NDArray[np.uint8]) -> str:
    """Return an image of [rows, columns, 3] colours as a data URI."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    rows, columns, _ = colors.shape
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0))
    data = b"".join(b"\0" + row.tobytes() for row in colors)
    body = head + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()
