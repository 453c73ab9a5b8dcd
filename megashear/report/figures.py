"""Figures of a report, drawn by plotly from runs: one, or several side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from megashear.config.schema import QUERY_HEAD
from megashear.report.drawing import (
    BLUE,
    DOTTED,
    GONE,
    INK,
    PALE,
    PALE_BLUE,
    PALER,
    REMOVED,
    TEMPLATE,
    VERMILION,
    Panel,
    Runs,
    Style,
    add_line,
    grid,
    name_bars,
    plain,
    styles,
)
from megashear.report.runs import RecordedRun
from megashear.report.series import (
    STRETCHES,
    Series,
    data_used,
    mapping,
    means,
    part,
    series,
    thin,
    time_spent,
)

CELLS = 256
"""Columns of a map at most: a phone has about as many pixels."""


def losses(runs: Runs, domains: Mapping[str, Style]) -> list[Panel]:
    """For each domain: validation, training and reference loss over the steps."""
    panels = []
    for name, style in domains.items():
        shown = {label: run for label, run in runs.items() if len(_losses(run, name)[0])}
        if not shown:
            continue
        figure = grid(list(shown), ["nats per token"], titled=len(runs) > 1)
        said = []
        for column, (label, run) in enumerate(shown.items(), 1):
            training = series(run, "step", "domain_losses", name)
            _add_noisy(figure, column, training, "training", (PALER, PALE), 0.6)
            valid = steps, values = _losses(run, name)
            add_line(figure, column, valid, "validation", {**style, "width": 2.5})
            reference = series(run, "evaluation", "references", name)
            add_line(figure, column, reference, "reference", DOTTED)
            said.append(f"{label} {values[0]:.3f} to {values[-1]:.3f} at step {steps[-1]}")
            if len(reference[1]):
                said.append(f"reference {reference[1][-1]:.3f}")
        _fit_losses(figure, "training")
        said_of_all = f"Validation loss: {', '.join(said)}"
        panels.append(Panel(name, said_of_all, figure, {name: style}))
    return panels


def _losses(run: RecordedRun, domain: str) -> Series:
    return series(run, "evaluation", "losses", domain)


def _add_noisy(
    figure: go.Figure, column: int, line: Series, name: str, colors: tuple[str, str], width: float
) -> None:
    """A line of every step; a long one pale and thin, and over it its mean in the second colour."""
    is_long = len(line[0]) > 2 * STRETCHES
    add_line(figure, column, thin(line), name, {"color": colors[not is_long], "width": width})
    if is_long:
        add_line(figure, column, means(line), "mean", {"color": colors[1], "width": 2})


def _fit_losses(figure: go.Figure, noisy: str) -> None:
    """Leaves out of sight what only the first steps of the noisy lines reach, and single peaks."""
    ends: list[float] = []
    for trace in figure.data:
        ends += np.quantile(trace.y, (0.005, 0.99) if trace.name == noisy else (0, 1)).tolist()
    if ends:
        low, high = min(ends), max(ends)
        margin = 0.05 * (high - low) or 0.1
        figure.update_yaxes(range=[low - margin, high + margin])


def gaps(runs: Runs, domains: Mapping[str, Style]) -> list[Panel]:
    """Validation loss above the reference, all domains in one figure."""
    return _of_domains(
        *(runs, domains, "gaps", "Gap: validation loss above the reference"), "nats per token"
    )


def weights(runs: Runs, domains: Mapping[str, Style]) -> list[Panel]:
    """Domain weights, each from its evaluation to the next."""
    panels = _of_domains(runs, domains, "domain_weights", "Domain weights", "share of the samples")
    for panel in panels:
        panel.figure.update_traces(line_shape="hv")
        panel.figure.update_yaxes(rangemode="tozero")
    return panels


def _of_domains(
    runs: Runs, domains: Mapping[str, Style], field: str, title: str, unit: str
) -> list[Panel]:
    figure = grid(list(runs), [unit], height=300)
    said = []
    for column, (label, run) in enumerate(runs.items(), 1):
        for name, style in domains.items():
            line = thin(series(run, "evaluation", field, name))
            add_line(figure, column, line, plain(name), {**style, "width": 2})
            if len(line[1]):
                said.append(f"{label} {name} {line[1][-1]:.3g}")
        if field == "gaps" and any(mapping(r, field) for r in run.records["evaluation"]):
            figure.add_hline(0, line={"color": INK, "dash": "dot", "width": 1}, col=column)
    return [Panel(title, f"At last: {', '.join(said)}", figure)] if said else []


def data(runs: Runs, domains: Mapping[str, Style]) -> list[Panel]:
    """Tokens by domain."""
    figure = grid(list(runs), [""], height=70 + 26 * len(domains), x_title="tokens")
    said = []
    for column, (label, run) in enumerate(runs.items(), 1):
        used = data_used(run)
        total = sum(used.values())
        if not total > 0:
            continue
        amounts = [used.get(name, 0.0) for name in domains]
        figure.add_bar(
            x=amounts,
            y=list(range(len(domains))),
            customdata=[plain(name) for name in domains],
            orientation="h",
            marker_color=[style["color"] for style in domains.values()],
            text=[f"{used[name] / total:.1%}" if name in used else "" for name in domains],
            textposition="outside",
            hovertemplate="%{customdata}: %{x:,.0f} tokens (%{text})<extra></extra>",
            **{"row": 1, "col": column},
        )
        figure.update_xaxes(
            range=[0, (1.3 + 0.4 * len(runs)) * max(amounts)], col=column
        )  # the text has room
        said.append(f"{label} {total:,.0f} tokens")
    name_bars(figure, list(domains), len(runs))
    figure.update_traces(cliponaxis=False)
    figure.update_xaxes(nticks=3, tickangle=0)
    return [Panel("Data used per domain", "; ".join(said), figure)] if said else []


def masks(runs: Runs) -> list[Panel]:
    """Of each constraint: expected and target sparsity, and its multipliers."""
    found = {label: mapping(run.last("step"), "sparsity") for label, run in runs.items()}
    pruned = {label: run for label, run in runs.items() if found[label]}
    names = {name: None for sparsity in found.values() for name in sparsity}
    return [_mask(pruned, name) for name in names]


def _mask(runs: Runs, name: str) -> Panel:
    figure = grid(list(runs), ["sparsity", "λ1", "λ2"], height=440)
    said = []
    for column, (label, run) in enumerate(runs.items(), 1):
        sparsity = thin(series(run, "step", "sparsity", name))
        target = thin(series(run, "step", "target_sparsity", name))
        add_line(figure, column, sparsity, "expected", {"color": BLUE, "width": 2.5})
        add_line(figure, column, target, "target", DOTTED)
        for row, number in ((2, 0), (3, 1)):
            line: Style = {"color": VERMILION, "width": 1.5}
            for end, values in _multipliers(run, name, number).items():
                add_line(figure, column, values, f"λ{number + 1}{end}", line, row)
        if len(sparsity[1]) and len(target[1]):
            said.append(f"{label} {sparsity[1][-1]:.3f} (target {target[1][-1]:.3f})")
    return Panel(name, f"Expected sparsity at last: {'; '.join(said)}", figure)


def _multipliers(run: RecordedRun, name: str, number: int) -> dict[str, Series]:
    """The one line of a shared multiplier; of one for each row, the least and the greatest."""
    rows: list[Series] = []
    while len((row := series(run, "step", "multipliers", name, number, len(rows)))[0]):
        rows.append(row)
    if len(rows) < 2 or len({len(steps) for steps, _ in rows}) > 1:
        return dict.fromkeys([""] * len(rows), thin(rows[0])) if rows else {}
    values = np.stack([values for _, values in rows])
    ends = {" (least)": values.min(0), " (greatest)": values.max(0)}
    return {end: thin((rows[0][0], of_rows)) for end, of_rows in ends.items()}


def maps(label: str, run: RecordedRun, is_one_of_several: bool) -> list[Panel]:
    """Units that the masks keep, a row for each layer; of wide layers their shares by stretches."""
    kept_layers = np.array(part(run.masks, "layer", 0) or [], dtype=bool)
    by_query_head = part(run.config, "pruning", "head_unit") == QUERY_HEAD
    head = "query head" if by_query_head else "head (query group)"
    units = {"layer": "layer", "head": head}
    return [
        _map(
            f"{label}, {name}" if is_one_of_several else name,
            units.get(name, f"{name} dimension"),
            np.array(rows, dtype=np.uint8),
            kept_layers,
        )
        for name, rows in run.masks.items()
        if rows and rows[0]
    ]


def _map(title: str, unit: str, units: np.ndarray, kept_layers: np.ndarray) -> Panel:
    kept, of = int(units.sum()), units.size
    layers = len(kept_layers)
    if layers and len(units) > layers and len(units) % layers == 0:
        units = units.reshape(layers, -1)  # query heads, group by group
    rows, columns = units.shape
    starts = np.unique(np.linspace(0, columns, min(columns, CELLS), endpoint=False, dtype=int))
    widths = np.diff([*starts, columns])
    shares = np.add.reduceat(units, starts, axis=1, dtype=np.float32) / widths
    figure = go.Figure(
        layout={"template": TEMPLATE, "height": 90 + min(max(rows, 2) * 14, 420)},
    )
    gap = 1 if columns <= 64 else 0
    figure.add_heatmap(
        z=shares.astype(np.float32),
        x=starts,
        **{"zmin": 0, "zmax": 1, "colorscale": [[0, REMOVED], [1, BLUE]], "showscale": False},
        **{"xgap": gap, "ygap": gap if rows > 1 else 0},
        hovertemplate="layer %{y}, " * (rows > 1) + "unit %{x}: %{z:.0%} kept<extra></extra>",
    )
    if rows == layers and rows > 1:
        _grey_out(figure, ~kept_layers, starts)
    figure.update_xaxes(title_text=unit, showgrid=False, automargin=True, rangemode="tozero")
    figure.update_yaxes(
        **{"autorange": "reversed", "showgrid": False, "visible": rows > 1},
        title_text="layer",
    )
    binned = f"; a cell is the share of {widths.max()} units" if columns > CELLS else ""
    return Panel(f"{title}: {kept:,} of {of:,} kept{binned}", f"Map by layer and {unit}", figure)


def _grey_out(figure: go.Figure, gone: np.ndarray, starts: np.ndarray) -> None:
    z = np.where(gone[:, None], 1.0, np.nan) * np.ones(len(starts))
    figure.add_heatmap(
        z=[[None if math.isnan(cell) else cell for cell in row] for row in z],
        x=starts,
        **{"colorscale": [[0, GONE], [1, GONE]], "showscale": False},
        hovertemplate="layer %{y} is removed<extra></extra>",
    )


PROGRESS = {
    "loss": ("Training loss", "nats per token"),
    "lr": ("Learning rate of the weights", "lr"),
    "grad_norm": ("Gradient norm of the weights, before clipping", "norm"),
    "mask_grad_norm": ("Gradient norm of the masks", "norm"),
    "multiplier_grad_norm": ("Gradient norm of the multipliers", "norm"),
    "penalty": ("Penalty of the constraints", "nats per token"),
}
SPEED = {
    "tokens_per_second": ("Throughput, all processes", "tokens/s"),
    "mfu": ("MFU: model FLOP/s, of the devices' peak", "share"),
    "memory_gib": ("Peak memory of a process", "GiB"),
    "data_seconds": ("Waiting for data", "seconds a step"),
}


def lines(runs: Runs, fields: Mapping[str, tuple[str, str]]) -> list[Panel]:
    """A figure for each of these fields of a step, with the runs that have recorded it."""
    panels = []
    for field_, (title, unit) in fields.items():
        recorded = {label: series(run, "step", field_) for label, run in runs.items()}
        shown = {label: line for label, line in recorded.items() if len(line[0])}
        if not shown:
            continue
        figure = grid(list(shown), [unit], titled=len(runs) > 1)
        for column, line in enumerate(shown.values(), 1):
            _add_noisy(figure, column, line, title, (PALE_BLUE, BLUE), 1.2)
        if field_ == "loss":
            _fit_losses(figure, title)
        if field_ == "lr":
            figure.update_yaxes(exponentformat="e")
        if field_ in SPEED:
            figure.update_yaxes(rangemode="tozero")
        said = [
            f"{label} median {np.median(values):.4g}, at last {values[-1]:.4g}"
            for label, (_, values) in shown.items()
        ]
        panels.append(Panel(title, "; ".join(said), figure))
    return panels


def time(runs: Runs) -> list[Panel]:
    """Where the time went, a bar for each run."""
    spent = {label: of_run for label, run in runs.items() if (of_run := time_spent(run))}
    keys = styles(list({what: None for of_run in spent.values() for what in of_run}))
    figure = go.Figure(layout={"template": TEMPLATE, "height": 70 + 40 * len(spent)})
    for what, style in keys.items():
        figure.add_bar(
            x=[of_run.get(what, 0.0) / sum(of_run.values()) for of_run in spent.values()],
            y=list(range(len(spent))),
            orientation="h",
            marker_color=style["color"],
            hovertemplate=f"{what}: %{{x:.1%}}<extra></extra>",
        )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title_text="share of the time", tickformat=".0%", range=[0, 1])
    name_bars(figure, list(spent))
    said = "; ".join(
        f"{label}: " + ", ".join(f"{what} {took:.3g} s" for what, took in of_run.items())
        for label, of_run in spent.items()
    )
    return [Panel("Where the time went", said, figure, keys)] if spent else []
