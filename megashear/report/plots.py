"""Plots as PNG files. Imports matplotlib where it draws, and neither torch nor Megatron."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megashear.reference.scaling_law import Fit

BLUE, RED, GREY = "#1f5fa8", "#b3261e", "#8a8a8a"


def scaling_laws(file: Path, laws: Mapping[str, Fit], target: float) -> None:
    """A panel for each domain: the models, the law through them, and its loss at the target.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, panels = _panels(len(laws))
    for axes, (name, law) in zip(panels, laws.items(), strict=True):
        ends = min(target, *law.sizes) / 1.5, 1.5 * max(target, *law.sizes)
        N = np.geomspace(*ends, 200)
        reference = law.loss(target)
        color = RED if law.flag else BLUE
        axes.plot(N, [law.loss(n) for n in N], color=color, linewidth=1.2)
        axes.plot(law.sizes, law.losses, "o", color=color, label="measured")
        axes.axvline(target, color=GREY, linewidth=0.8, linestyle=":")
        axes.plot([target], [reference], "*", color="black", markersize=11, label="target")
        axes.annotate(f"{reference:.4f}", (target, reference), (8, 3), textcoords="offset points")
        _label_sizes(axes, decades=np.log10(ends[1] / ends[0]))
        note = law.flag.split(":")[0]
        axes.set_title(f"{name} ({note})" if note else name, fontsize=10, color=color)
        axes.grid(alpha=0.25)
    figure.supxlabel("parameters")
    figure.supylabel("loss (nats per token)")
    panels[0].legend(fontsize=8)
    _save(figure, file)


def domain_losses(
    file: Path, title: str, losses: Mapping[str, float], earlier: Mapping[str, float]
) -> None:
    """A bar for the loss of each domain, with the earlier reference where there is one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, (axes,) = _panels(1, height=1 + 0.3 * len(losses))
    bars = axes.barh(list(losses), list(losses.values()), color=BLUE)
    axes.bar_label(bars, fmt="%.4f", label_type="center", color="white")
    if earlier:
        axes.plot(list(earlier.values()), list(earlier), "D", color=RED, label="earlier reference")
        figure.legend(loc="outside lower right", fontsize=8)
    axes.invert_yaxis()  # the first domain on top
    axes.set_xlabel("loss (nats per token)")
    axes.set_title(title, fontsize=10)
    _save(figure, file)


def _label_sizes(axes: Any, decades: float) -> None:
    """A logarithmic axis with labels like 7B: few, where it covers many decades."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    short = EngFormatter(sep="")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
    axes.xaxis.set_major_formatter(lambda N, _: short(N).replace("G", "B").replace("k", "K"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _panels(count: int, height: float = 2.6) -> tuple[Any, list[Any]]:
    """A figure that needs no display, and as many axes."""
    from matplotlib.figure import Figure

    columns = min(count, 4)
    rows = -(-count // columns)
    width = 7.0 if columns == 1 else 3.2 * columns
    figure = Figure(figsize=(width, height * rows), dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _save(figure: Any, file: Path) -> None:
    partial = file.with_name(f".{file.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, file)
