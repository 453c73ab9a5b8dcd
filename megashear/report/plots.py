"""Pages of other measurements than runs: losses of models, and scaling laws through them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megashear.reference.scaling_law import Fit
from megashear.report.drawing import (
    BLUE,
    INK,
    VERMILION,
    Axis,
    Bar,
    Line,
    Panel,
    Plot,
    Style,
    plot,
    short,
)
from megashear.report.page import document


def scaling_laws(laws: Mapping[str, Fit], target: float) -> str:
    """Return a page with the panels of all laws."""
    note = (
        "Loss (nats per token) by parameters. Dots: the models that were measured. Line: the law "
        "through them; red if it is not to be trusted. Large dot: its loss at the target's size, "
        "which is the reference."
    )
    return document("Scaling laws", note, law_panels(laws, target), 300)


def law_panels(laws: Mapping[str, Fit], target: float) -> list[Panel]:
    """For each domain: the models, the law through them, and its loss at the target."""
    panels = []
    for name, law in laws.items():
        ends = min(target, *law.sizes) / 1.5, 1.5 * max(target, *law.sizes)
        N = np.geomspace(*ends, 100)
        color = VERMILION if law.flag else BLUE
        reference = law.loss(target)
        models = np.array(law.sizes), np.array(law.losses)
        lines = [
            Line("law", (N, np.array([law.loss(n) for n in N])), Style(color), dots=False),
            Line("model", models, Style(color), only_dots=True),
            Line(
                "reference",
                (np.array([target]), np.array([reference])),
                Style(INK, width=6),
                only_dots=True,
            ),
        ]
        ticks = {size: short(size) for size in sorted({*law.sizes, target})}
        y = plot(lines, "nats per token").y
        drawn = Plot(Axis(*ends, ticks, "parameters", is_log=True), y, lines, 230)
        flag = f" ({law.flag.split(':')[0]})" if law.flag else ""
        text = f"{reference:.4f} at {short(target)}"
        panels.append(Panel(f"{name}{flag}: {text}", f"Reference {text} parameters", [drawn]))
    return panels


def domain_losses(title: str, losses: Mapping[str, float], earlier: Mapping[str, float]) -> str:
    """Return a page with the losses of the domains of a model."""
    note = "Validation loss (nats per token)."
    note += " Red marks: the references until now." if earlier else ""
    return document(title, note, [losses_panel(losses, earlier)])


def losses_panel(losses: Mapping[str, float], earlier: Mapping[str, float]) -> Panel:
    """A bar for the loss of each domain, with the earlier reference where there is one."""
    most = 1.25 * max([*losses.values(), *earlier.values()])
    bars = [
        Bar(
            name,
            [(BLUE, loss / most, f"{loss:.6f}")],
            f"{loss:.4f}",
            earlier[name] / most if name in earlier else None,
        )
        for name, loss in losses.items()
    ]
    text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    return Panel("Loss of each domain", text, bars=bars)
