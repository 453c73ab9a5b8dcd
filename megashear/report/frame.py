"""The current state of runs as one frame for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megashear.report.runs import RecordedRun
from megashear.report.series import labels, last, mapping, number, part, seconds_since_1970
from megashear.report.tables import duration, how_it_ended, show

DEFAULT_TIMEOUT_MINUTES = 10.0
"""`platform.timeout_minutes` until the run has written its configuration."""
_STEPS = 100
"""Number of newest steps that the time left is estimated from."""


def frame(runs: Sequence[RecordedRun], now: float, width: int) -> RenderableType:
    """Show one run in detail, or several with a line each.

    Args:
        runs: runs as read so far.
        now: seconds since 1970.
        width: columns of the terminal; a narrow one shows less.
    """
    if len(runs) == 1:
        return _whole(runs[0], now, width)
    header = ("run", "stage", "step", "time left", "loss", "gap", "tok/s", "state")
    names = labels([run.directory for run in runs])
    rows = [(name, *_line(run, now)) for name, run in zip(names, runs, strict=True)]
    return _table(header, rows, width, rather_without=(1, 5, 6, 4, 3), left=(0, 1, 7))


def state(run: RecordedRun, now: float) -> tuple[str, str]:
    """Return what a run does, and the style to show it in."""
    newest = run.newest
    if not newest:
        return "not begun", "yellow"
    if ended := how_it_ended(run):
        return ended, "green" if is_over(run) else "yellow"
    silent = now - seconds_since_1970(newest.get("time"))
    if math.isnan(silent):
        return "no sign of when", "yellow"
    silence = f"silent for {duration(max(silent, 0))}"
    if silent > _patience(run):
        return f"{silence}: perhaps dead", "bold red"
    return ("running" if silent < 60 else f"running, {silence}"), "green"


def is_over(run: RecordedRun) -> bool:
    """Whether the run is complete."""
    return run.newest.get("kind") == "end" and run.newest.get("reason") == "complete"


def _patience(run: RecordedRun) -> float:
    """Seconds without a record after which a live run would have ended itself."""
    timeout = number(part(run.config, "platform", "timeout_minutes"))
    minutes = DEFAULT_TIMEOUT_MINUTES if math.isnan(timeout) else timeout
    longest = [number(records[-1].get("seconds")) for records in run.records.values() if records]
    return 60 * minutes + max((seconds for seconds in longest if seconds > 0), default=0.0)


def seconds_left(run: RecordedRun) -> float:
    """Estimate the seconds left from the newest steps since the last start, with their pauses."""
    steps, began = number(run.steps), number(run.start.get("step"))
    newest = [r for r in run.records["step"][-_STEPS:] if not r["step"] <= began]
    if math.isnan(steps) or not newest or is_over(run):
        return math.nan
    if len(newest) == 1:
        pace = number(newest[0].get("seconds"))
    else:
        ends = newest[0], newest[-1]
        times = [seconds_since_1970(record.get("time")) for record in ends]
        pace = (times[1] - times[0]) / (ends[1]["step"] - ends[0]["step"])
    return (steps - run.step) * pace


def _whole(run: RecordedRun, now: float, width: int) -> RenderableType:
    word, style = state(run, now)
    head = Table.grid(expand=True)
    head.add_row(
        Text(str(run.directory), "bold", overflow="fold"), Text(word, style, justify="right")
    )
    parts: list[RenderableType] = [head, _progress(run), *_facts(run)]
    parts += [table for table in (_domains(run, width), _masks(run, width)) if table is not None]
    parts += [Text(problem, "yellow") for problem in run.problems[-3:]]
    verdict = run.newest.get("verdict")
    if verdict:
        parts.append(Text(show(verdict).splitlines()[0], "bold red"))
    return Group(*parts)


def _progress(run: RecordedRun) -> RenderableType:
    steps = number(run.steps)
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    share = "" if math.isnan(steps) else f" of {steps:,.0f} ({run.step / max(steps, 1):.0%})"
    left = seconds_left(run)
    eta = "" if math.isnan(left) else f", {duration(left)} left"
    stage = show(run.start.get("stage", run.config.get("stage")))
    total = None if math.isnan(steps) else max(steps, 1)
    bar = ProgressBar(total=total or 1, completed=run.step if total else 0)
    line.add_row(Text(stage, "bold"), bar, f"step {run.step:,}{share}{eta}")
    return line


def _facts(run: RecordedRun) -> list[Text]:
    start, newest = run.start, run.last("step")
    layout = mapping(start, "layout")
    parts = [f"{name} {show(size)}" for name, size in layout.items() if size != 1]
    target = start.get("target_parameters")
    model = [show(start.get("parameters"))] + ([show(target)] if target else [])
    lines = []
    if start:
        size = math.prod(int(n) for n in layout.values() if number(n) > 0)
        job = [f"job {show(start['job'])}"] if start.get("job") else []
        where = [f"{size} x {show(start.get('device'))}", *parts, *job]
        lines.append(f"{' -> '.join(model)} parameters · {' · '.join(where)}")
    if newest:
        seconds, data = number(newest.get("seconds")), number(newest.get("data_seconds"))
        facts = [
            f"loss {show(newest.get('loss'), '.4f')}",
            f"lr {show(newest.get('lr'), '.2e')}",
            f"grad norm {show(newest.get('grad_norm'), '.2f')}",
            f"{show(newest.get('tokens_per_second'), ',.0f')} tok/s",
            *([f"MFU {show(newest['mfu'], '.1%')}"] if newest.get("mfu") else []),
            f"data wait {show(data / seconds if seconds else math.nan, '.1%')}",
        ]
        lines.append(" · ".join(facts))
        every = number(start.get("tokens_per_step")) * number(run.steps)
        facts = [
            f"{show(newest.get('tokens'))} of {show(every, ',.0f')} tokens",
            f"{show(newest.get('memory_gib'), '.1f')} GiB",
            _saved(run),
        ]
        lines.append(" · ".join(facts))
    return [Text(line) for line in lines]


def _saved(run: RecordedRun) -> str:
    save = run.last("save")
    if not save:
        return "nothing saved"
    return f"saved at step {save['step']:,}, in {show(save.get('seconds'), ',.1f')} s"


def _domains(run: RecordedRun, width: int) -> Table | None:
    """The newest losses of each domain, and the last change of its weight."""
    newest = run.last("evaluation")
    before = [r for r in run.records["evaluation"] if r is not newest][-1:] or [run.start]
    weights = mapping(newest, "domain_weights") or mapping(run.start, "domain_weights")
    rows = []
    for name in weights:
        gap = number(part(newest, "gaps", name))
        moved = number(weights[name]) - number(part(before[0], "domain_weights", name))
        rows.append(
            (
                name,
                show(last(run, "step", "domain_losses", name), ".4f"),
                show(part(newest, "losses", name), ".4f"),
                show(part(newest, "references", name), ".4f"),
                Text(show(gap, "+.4f"), "red" if gap > 0 else "green"),
                show(weights[name], ".4f"),
                show(moved, "+.4f"),
            )
        )
    at = f"{newest['step']:,}" if newest else "-"
    header = ("domain", "training", f"at step {at}", "reference", "gap", "weight", "moved")
    return _table(header, rows, width, rather_without=(1, 6, 3, 2)) if rows else None


def _masks(run: RecordedRun, width: int) -> Table | None:
    """Expected sparsity, its current target, and the units that the masks keep."""
    newest, kept = run.last("step"), mapping(run.last("evaluation"), "kept")
    sparsity, target = mapping(newest, "sparsity"), mapping(newest, "target_sparsity")
    rows = []
    for name, value in sparsity.items():
        off = number(value) - number(target.get(name))
        close = abs(off) < 0.02  # the tolerance of the run's own verdict
        found = kept.get(name)
        counts = [n for n in found if number(n) >= 0] if isinstance(found, list) else []
        units = "-" if not counts else f"{min(counts):,}"
        if counts and max(counts) > min(counts):
            units += f" to {max(counts):,}"
        bar = ProgressBar(total=1.0, completed=max(0.0, min(1.0, number(value) or 0.0)), width=12)
        cells = (show(value, ".4f"), show(target.get(name), ".4f"))
        rows.append(
            (name, bar, *cells, Text(show(off, "+.4f"), "green" if close else "red"), units)
        )
    header = ("mask", "removed", "sparsity", "target", "off", "units")
    return _table(header, rows, width, rather_without=(1, 4, 5)) if rows else None


def _line(run: RecordedRun, now: float) -> tuple[Any, ...]:
    word, style = state(run, now)
    steps, left = number(run.steps), seconds_left(run)
    newest = run.last("step")
    gaps = [number(gap) for gap in mapping(run.last("evaluation"), "gaps").values()]
    return (
        show(run.start.get("stage", run.config.get("stage"))),
        f"{run.step:,}" + ("" if math.isnan(steps) else f"/{steps:,.0f}"),
        "-" if math.isnan(left) else duration(left),
        show(newest.get("loss"), ".4f"),
        show(sum(gaps) / len(gaps) if gaps else math.nan, "+.4f"),
        show(newest.get("tokens_per_second"), ",.0f"),
        Text(word, style),
    )


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    width: int,
    *,
    rather_without: Sequence[int],
    left: Sequence[int] = (0,),
) -> Table:
    """Return a table that is at most `width` wide.

    Columns in `rather_without` are dropped in that order until it fits. Columns in `left` are
    aligned to the left.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    columns = list(range(len(header)))
    for column in rather_without:
        widths = [max(_width(row[at]) for row in (header, *rows)) + 3 for at in columns]
        if sum(widths) > width + 1:
            columns.remove(column)
    for column in columns:
        justify: Any = "left" if column in left else "right"
        table.add_column(header[column], justify=justify, no_wrap=True)
    for row in rows:
        cells = [row[column] for column in columns]
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    return table


def _width(cell: str | Text | ProgressBar) -> int:
    return cell.width or 0 if isinstance(cell, ProgressBar) else cell_len(str(cell))
