"""Figures of a report, drawn from runs: one, or several in the same axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megashear.config.schema import QUERY_HEAD
from megashear.report.drawing import (
    BLUE,
    DOTTED,
    KEPT,
    LAYER_REMOVED,
    REMOVED,
    VERMILION,
    Bar,
    Line,
    Map,
    Panel,
    Plot,
    Points,
    Runs,
    Style,
    linear,
    plot,
    png,
    short,
    styles,
)
from megashear.report.series import (
    STRETCHES,
    data_used,
    domains,
    mapping,
    means,
    part,
    series,
    thin,
    time_spent,
    tokens_per_step,
)

CELLS = 256
"""Columns that a map has at most: a phone has about as many pixels."""


class Figures:
    """Figures of runs, over tokens where every run states them, else over steps.

    Attributes:
        runs: by their names in the report.
        colors: a style for each run.
        domains: a style for each domain.
        unit: of the lower axis, tokens or step.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.colors = styles(list(runs))
        self.domains = styles(domains(list(runs.values())))
        tokens = {label: tokens_per_step(run) for label, run in runs.items()}
        by_tokens = all(each > 0 for each in tokens.values())
        self.unit = "tokens" if by_tokens else "step"
        self._units = tokens if by_tokens else dict.fromkeys(runs, 1)

    def _line(self, label: str, kind: str, *path: str | int) -> Points:
        steps, values = series(self.runs[label], kind, *path)
        return steps * self._units[label], values

    def _keys(self, labels: Sequence[str]) -> dict[str, Style]:
        """A legend of runs, where there are several in the report."""
        return {label: self.colors[label] for label in labels if len(self.runs) > 1}

    def losses(self) -> list[Panel]:
        """Validation, training and reference losses of each domain."""
        panels = []
        for name, style in self.domains.items():
            noisy, lines, texts, shown = [], [], [], []
            for label in self.runs:
                points = self._line(label, "evaluation", "losses", name)
                if not len(points[0]):
                    continue
                shown.append(label)
                color = self.colors[label] if len(self.runs) > 1 else style
                training = self._line(label, "step", "domain_losses", name)
                noisy += _noisy(self._title("training", label), training, color, is_cut=True)
                bold = replace(color, width=2.5)
                lines.append(Line(self._title("validation", label), points, bold))
                texts.append(f"{label} {points[1][0]:.3f} to {points[1][-1]:.3f}")
                reference = self._line(label, "evaluation", "references", name)
                if len(reference[1]):
                    lines.append(Line("reference", reference, DOTTED, dots=False))
                    texts.append(f"reference {reference[1][-1]:.3f}")
            if lines:
                drawn = plot([*noisy, *lines], "nats per token", self.unit)
                keys = self._keys(shown) or {name: style}
                text = f"Validation loss: {', '.join(texts)}"
                panels.append(Panel(name, text, [drawn], keys=keys))
        return panels

    def gaps(self) -> list[Panel]:
        """Validation loss above the reference, for each run."""
        panels = self._by_domain("gaps", "Validation loss above the reference", "nats per token")
        return [replace(each, plots=[_with_zero(each.plots[0])]) for each in panels]

    def weights(self) -> list[Panel]:
        """Domain weights, each from its evaluation to the next, for each run."""
        return self._by_domain(
            "domain_weights", "Domain weights", "fraction of samples", is_step=True
        )

    def _by_domain(
        self, field: str, title: str, unit: str, *, is_step: bool = False
    ) -> list[Panel]:
        panels = []
        for label in self.runs:
            lines, text = [], []
            for name, style in self.domains.items():
                points = thin(self._line(label, "evaluation", field, name))
                if len(points[1]):
                    lines.append(Line(name, points, style, is_step=is_step))
                    text.append(f"{name} {points[1][-1]:.3g}")
            if lines:
                drawn = plot(lines, unit, self.unit, from_zero=is_step, height=260)
                panels.append(
                    Panel(self._title(title, label), f"At the end: {', '.join(text)}", [drawn])
                )
        return panels

    def _title(self, title: str, label: str) -> str:
        return f"{title} ({label})" if len(self.runs) > 1 else title

    def data(self) -> list[Panel]:
        """Tokens that each run drew from each domain."""
        panels = []
        for label, run in self.runs.items():
            used = data_used(run)
            if not (total := sum(used.values())) > 0:
                continue
            most = max(used.values())
            bars = [
                Bar(
                    name,
                    [(self.domains[name].color, 0.6 * amount / most, f"{amount:,.0f} tokens")],
                    f"{short(amount)} ({amount / total:.1%})",
                )
                for name, amount in used.items()
                if name in self.domains
            ]
            title = self._title("Tokens per domain", label)
            panels.append(Panel(title, f"{total:,.0f} tokens", bars=bars))
        return panels

    def masks(self) -> list[Panel]:
        """Expected and target sparsity of each constraint, and its multipliers."""
        panels = []
        for label, run in self.runs.items():
            for name in mapping(run.last("step"), "sparsity"):
                sparsity = thin(self._line(label, "step", "sparsity", name))
                target = thin(self._line(label, "step", "target_sparsity", name))
                if not len(sparsity[0]):
                    continue
                lines = [Line("expected", sparsity, Style(BLUE, width=2.5))]
                lines += [Line("target", target, DOTTED)] if len(target[0]) else []
                plots = [plot(lines, "sparsity", from_zero=True, height=180)]
                for number in (0, 1):
                    name_, style = f"λ{number + 1}", Style(VERMILION, width=1.5)
                    multipliers = self._multipliers(label, name, number).items()
                    lines = [Line(name_ + end, points, style) for end, points in multipliers]
                    title = self.unit if number else ""
                    plots += [plot(lines, name_, title, height=120)] if lines else []
                at_end = f"{sparsity[1][-1]:.3f}"
                at_end += f" (target {target[1][-1]:.3f})" if len(target[1]) else ""
                text = f"Expected sparsity at the end: {at_end}"
                panels.append(Panel(self._title(name, label), text, plots))
        return panels

    def _multipliers(self, label: str, name: str, number: int) -> dict[str, Points]:
        """A shared multiplier; of one for each row, the least and the greatest."""
        rows: list[Points] = []
        while len((row := self._line(label, "step", "multipliers", name, number, len(rows)))[0]):
            rows.append(row)
        if len(rows) < 2 or len({len(steps) for steps, _ in rows}) > 1:
            return {"": thin(rows[0])} if rows else {}
        values = np.stack([values for _, values in rows])
        ends = {" (least)": values.min(0), " (greatest)": values.max(0)}
        return {end: thin((rows[0][0], of_rows)) for end, of_rows in ends.items()}

    def steps(self, fields: Mapping[str, tuple[str, str]]) -> list[Panel]:
        """A figure for each of these fields of a step, with the runs that recorded it."""
        panels = []
        for name, (title, unit) in fields.items():
            recorded = {label: self._line(label, "step", name) for label in self.runs}
            shown = {label: line for label, line in recorded.items() if len(line[0])}
            if not shown:
                continue
            lines = []
            for label, line in shown.items():
                color = self.colors[label] if len(self.runs) > 1 else Style(BLUE)
                lines += _noisy(label, line, color, is_cut=name == "loss")
            drawn = plot(lines, unit, self.unit, from_zero=name in SPEED)
            text = "; ".join(
                f"{label} median {np.median(values):.4g}, at the end {values[-1]:.4g}"
                for label, (_, values) in shown.items()
            )
            panels.append(Panel(title, text, [drawn], keys=self._keys(list(shown))))
        return panels

    def time(self) -> list[Panel]:
        """Where the time went, a bar for each run."""
        spent = {label: of_run for label, run in self.runs.items() if (of_run := time_spent(run))}
        keys = styles(list({what: None for of_run in spent.values() for what in of_run}))
        bars = []
        for label, of_run in spent.items():
            fractions = {what: took / sum(of_run.values()) for what, took in of_run.items()}
            pieces = [(keys[what].color, f, f"{what}: {f:.1%}") for what, f in fractions.items()]
            bars.append(Bar(label, pieces))
        text = "; ".join(
            f"{label}: " + ", ".join(f"{what} {took:.3g} s" for what, took in of_run.items())
            for label, of_run in spent.items()
        )
        return [Panel("Where the time went", text, bars=bars, keys=keys)] if spent else []

    def maps(self) -> list[Panel]:
        """Units that the masks keep, a row for each layer; of wide layers a cell is several."""
        panels = []
        for label, run in self.runs.items():
            kept_layers = np.array(part(run.masks, "layer", 0) or [], dtype=bool)
            by_query_head = part(run.config, "pruning", "head_unit") == QUERY_HEAD
            units = {"layer": "layer"}
            units["head"] = "query head" if by_query_head else "head (query group)"
            for name, rows in run.masks.items():
                if rows and rows[0]:
                    title, unit = self._title(name, label), units.get(name, f"{name} dimension")
                    panels.append(_map(title, unit, np.array(rows, dtype=np.uint8), kept_layers))
        return panels


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
    "mfu": ("MFU: model FLOP/s, as a fraction of the devices' peak", "fraction"),
    "memory_gib": ("Peak memory of a process", "GiB"),
    "data_seconds": ("Waiting for data", "seconds per step"),
}


def _noisy(name: str, line: Points, style: Style, is_cut: bool) -> list[Line]:
    """A line of every step, thin; a long one pale, with its mean drawn over it."""
    if not len(line[0]):
        return []
    is_long = len(line[0]) > 2 * STRETCHES
    pale = replace(style, width=0.8 if is_long else 1.2, opacity=0.25 if is_long else 0.8)
    lines = [Line(name, thin(line), pale, dots=False, is_cut=is_cut)]
    if is_long:
        mean = replace(style, width=1.8, opacity=0.8)
        lines.append(Line(f"{name}, mean", means(line), mean, dots=False))
    return lines


def _with_zero(drawn: Plot) -> Plot:
    """The same axes with a line at 0, if it is in their range."""
    if not drawn.y.low < 0 < drawn.y.high:
        return drawn
    points = np.array([drawn.x.low, drawn.x.high]), np.zeros(2)
    zero = Line("reference", points, DOTTED, dots=False)
    return replace(drawn, lines=[*drawn.lines, zero])


def _map(title: str, unit: str, units: NDArray[np.uint8], kept_layers: NDArray[np.bool_]) -> Panel:
    kept, of = int(units.sum()), units.size
    layers = len(kept_layers)
    if layers and len(units) > layers and len(units) % layers == 0:
        units = units.reshape(layers, -1)  # query heads, group by group
    rows, columns = units.shape
    starts = np.unique(np.linspace(0, columns, min(columns, CELLS), endpoint=False, dtype=int))
    widths = np.diff([*starts, columns])
    fractions = np.add.reduceat(units, starts, axis=1, dtype=np.float32) / widths
    colors = np.array(REMOVED) + fractions[..., None] * (np.array(KEPT) - np.array(REMOVED))
    if rows == layers and rows > 1:
        colors[~kept_layers] = LAYER_REMOVED
    binned = f"; a cell is the fraction of {widths.max()} units" if columns > CELLS else ""
    axis = linear(0, columns, unit)
    image = Map(png(colors.astype(np.uint8)), min(max(rows, 2) * 14, 420), axis, rows)
    caption = f"{title}: {kept:,} of {of:,} kept{binned}"
    return Panel(caption, f"Map by layer and {unit}", map=image)
