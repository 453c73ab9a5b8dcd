"""What the figures of a report have in common: colours, a grid of panels, a line."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megashear.report.runs import RecordedRun
from megashear.report.series import Series

Style = Mapping[str, str | float]
"""Of a line: color, dash, width."""
Runs = Mapping[str, RecordedRun]
"""By the names that the report has for them."""

# Okabe and Ito's colours, told apart by all eyes; the last is too pale for thin lines.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
)
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#000000", "#B8AC1F")
DASHES = ("solid", "dash", "dot", "dashdot")
INK, PALE, PALER, PALE_BLUE = "#444444", "#8A8A8A", "#CFCFCF", "#A9CDE3"
REMOVED, GONE = "#EDEDED", "#B5B5B5"
DOTTED: Style = {"color": INK, "dash": "dot", "width": 2}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "colorway": COLORS,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "dragmode": False,  # a finger that moves over a figure scrolls the page
        "showlegend": False,
        "xaxis": {"gridcolor": "#E3E3E3", "zeroline": False, "automargin": True, "nticks": 6},
        "yaxis": {
            **{"gridcolor": "#E3E3E3", "zeroline": False, "automargin": True, "nticks": 6},
            "title": {"standoff": 8},
        },
    }
)


@dataclass(frozen=True)
class Panel:
    """A figure, its caption, what a reader who does not see it is told, and keys to its colours."""

    title: str
    description: str
    figure: go.Figure
    keys: Mapping[str, Style] = field(default_factory=dict)


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A colour for each domain, and from the ninth on another dash."""
    return {
        name: {
            "color": COLORS[number % len(COLORS)],
            "dash": DASHES[number // len(COLORS) % len(DASHES)],
        }
        for number, name in enumerate(names)
    }


def plain(text: str, most: int = 28) -> str:
    """A name as plotly shows it literally, and short enough for a title."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return html.escape(shown if len(shown) <= most else f"…{shown[1 - most :]}")


def grid(
    labels: Sequence[str],
    rows: Sequence[str],
    height: int = 230,
    x_title: str = "step",
    titled: bool = False,
) -> go.Figure:
    """A panel for each of the rows, named by its unit, and in it a column for each run."""
    titled = titled or len(labels) > 1
    figure = make_subplots(
        *(len(rows), len(labels)),
        shared_xaxes=True,
        shared_yaxes=True,
        column_titles=[plain(label) for label in labels] if titled else None,
        horizontal_spacing=0.16 / len(labels),
        vertical_spacing=0.06,
    )
    figure.update_layout(template=TEMPLATE, height=height, margin_t=24 if titled else 8)
    figure.update_annotations(font_size=12)
    for row, unit in enumerate(rows, 1):
        figure.update_yaxes(title_text=unit, row=row, col=1)
    figure.update_xaxes(title_text=x_title, row=len(rows))
    return figure


def add_line(
    figure: go.Figure,
    column: int,
    line: Series,
    name: str,
    style: Style,
    row: int = 1,
) -> None:
    """Draw a line over the steps in the column of a run; nothing where it has no points."""
    steps, values = line
    if not len(steps):
        return
    figure.add_scatter(
        x=steps.astype(np.int32) if steps[-1] < 2**31 else steps,
        y=values.astype(np.float32),
        mode="lines+markers" if len(steps) <= 12 else "lines",
        name=name,
        line=dict(style),
        marker_size=5,
        hovertemplate=f"{name}, step %{{x:,}}: %{{y:.5g}}<extra></extra>",
        **{"row": row, "col": column},
    )


def name_bars(figure: go.Figure, names: Sequence[str], columns: int = 1) -> None:
    """Names beside horizontal bars that stand at 0, 1, 2 and so on, from above."""
    texts = [plain(name, max(28 // columns, 8)) for name in names]
    figure.update_yaxes(autorange="reversed", tickvals=list(range(len(texts))), ticktext=texts)
