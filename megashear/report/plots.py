"""Pages of what a command has measured besides runs: losses of models, and laws through them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from megashear.reference.scaling_law import Fit
from megashear.report.drawing import BLUE, INK, TEMPLATE, VERMILION, Panel, name_bars
from megashear.report.page import document, draw


def scaling_laws(laws: Mapping[str, Fit], target: float) -> str:
    """A page with the panels of all laws."""
    note = (
        "<p>Loss (nats per token) by parameters. Dots: the models that were measured. Line: the "
        "law through them; red where it is not to be trusted. Star: its loss at the target's size, "
        "which is the reference.</p>"
    )
    return document("Scaling laws", note, draw(law_panels(laws, target), 300))


def law_panels(laws: Mapping[str, Fit], target: float) -> list[Panel]:
    """For each domain: the models, the law through them, and its loss at the target."""
    panels = []
    for name, law in laws.items():
        ends = min(target, *law.sizes) / 1.5, 1.5 * max(target, *law.sizes)
        N = np.geomspace(*ends, 100)
        color = VERMILION if law.flag else BLUE
        figure = go.Figure(layout={"template": TEMPLATE, "height": 260})
        figure.add_scatter(x=N, y=[law.loss(n) for n in N], mode="lines", line_color=color)
        dots = {"color": color, "size": 8}
        figure.add_scatter(x=law.sizes, y=law.losses, mode="markers", marker=dots)
        star = {"color": INK, "size": 13, "symbol": "star"}
        figure.add_scatter(x=[target], y=[law.loss(target)], mode="markers", marker=star)
        ticks = sorted({*law.sizes, target})
        figure.update_xaxes(
            **{"type": "log", "range": np.log10(ends), "title_text": "parameters"},
            **{"tickvals": ticks, "ticktext": [short(size) for size in ticks]},
        )
        figure.update_yaxes(title_text="nats per token")
        figure.update_traces(hovertemplate="%{x:,.0f} parameters: %{y:.4f}<extra></extra>")
        flag = f" ({law.flag.split(':')[0]})" if law.flag else ""
        said = f"{law.loss(target):.4f} at {short(target)}"
        panels.append(Panel(f"{name}{flag}: {said}", f"Reference {said} parameters", figure))
    return panels


def short(size: float) -> str:
    """A number of parameters as 1.35B."""
    for unit, of in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if size >= of:
            return f"{size / of:.3g}{unit}"
    return f"{size:.0f}"


def domain_losses(title: str, losses: Mapping[str, float], earlier: Mapping[str, float]) -> str:
    """A page with the losses of the domains of a model."""
    note = "<p>Validation loss (nats per token)."
    note += " Red marks: the references until now.</p>" if earlier else "</p>"
    return document(title, note, draw([losses_panel(losses, earlier)]))


def losses_panel(losses: Mapping[str, float], earlier: Mapping[str, float]) -> Panel:
    """A bar for the loss of each domain, with the earlier reference where there is one."""
    figure = go.Figure(layout={"template": TEMPLATE, "height": 70 + 26 * len(losses)})
    rows = {name: row for row, name in enumerate(losses)}
    figure.add_bar(
        x=list(losses.values()),
        y=list(rows.values()),
        orientation="h",
        marker_color=BLUE,
        texttemplate="%{x:.4f}",
        textposition="inside",
        insidetextanchor="start",
        textfont_color="white",
        hovertemplate="%{x:.6f}<extra></extra>",
    )
    if earlier:
        figure.add_scatter(
            **{"x": list(earlier.values()), "y": [rows[name] for name in earlier]},
            **{"mode": "markers", "marker": {"color": VERMILION, "size": 11, "symbol": "diamond"}},
            hovertemplate="earlier reference %{x:.4f}<extra></extra>",
        )
    name_bars(figure, list(losses))
    figure.update_xaxes(title_text="nats per token")
    said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    return Panel("Loss of each domain", said, figure)
