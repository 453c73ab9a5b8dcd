"""The tables of a report. A run may be unfinished, or its records may be incomplete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megashear.report.runs import RecordedRun
from megashear.report.series import (
    data_used,
    last,
    mapping,
    number,
    seconds_since_1970,
    series,
    time_spent,
    tokens_per_step,
)

NONE = "-"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the rows. Cells of words are wrapped."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


def columns(title: str, facts: Mapping[str, Mapping[str, str]], words: bool = False) -> Table:
    """A table of columns with named facts, and a row for each fact that one of them has."""
    names = {name: None for column in facts.values() for name in column}
    rows = [(name, *(column.get(name, NONE) for column in facts.values())) for name in names]
    return Table(title, ("", *facts), rows, words)


def of_runs(
    title: str,
    runs: Mapping[str, RecordedRun],
    facts: Callable[[RecordedRun], Mapping[str, str]],
    words: bool = False,
) -> Table:
    """A table with a column for each run."""
    return columns(title, {label: facts(run) for label, run in runs.items()}, words)


def show(value: Any, form: str = ",") -> str:
    """Return a value of a file as the text of a cell."""
    if isinstance(value, str):
        return value[:300]
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(show, value))
    return NONE if math.isnan(number(value)) else format(value, form)


def duration(seconds: float) -> str:
    """Return 26:03:05 h, or 4.2 s for less than 100 seconds."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} h"


def processes(run: RecordedRun) -> int:
    """Return the number of processes at the last start; 1 if it is not recorded."""
    layout = mapping(run.start, "layout")
    return math.prod(int(size) for size in layout.values() if number(size) > 0)


def overview(run: RecordedRun) -> dict[str, str]:
    """The run's directory, machines and settings, and its speed."""
    start = run.start
    layout = mapping(start, "layout")
    facts = {
        "directory": str(run.directory),
        "tokens per step": show(tokens_per_step(run), ",.0f"),
        "hosts": _hosts(start),
        "layout": show(layout) if layout else NONE,
        "precision": show(start.get("precision")),
        "layers, kernels": f"{show(start['layers'])}, {show(start.get('kernels'))}"
        if "layers" in start
        else NONE,
    }
    for name, field, form in (
        ("tokens/s, median of steps", "tokens_per_second", ",.0f"),
        ("MFU, median of steps", "mfu", ".1%"),
    ):
        values = series(run, "step", field)[1]
        facts[name] = format(float(np.median(values)), form) if len(values) else NONE
    facts["peak memory of a process (GiB)"] = show(last(run, "step", "memory_gib"), ".2f")
    return {fact: value for fact, value in facts.items() if value != NONE}


def _hosts(start: Mapping[str, Any]) -> str:
    """The first hosts; the table of starts has all of them."""
    hosts = start.get("hosts")
    if not isinstance(hosts, list) or len(hosts) <= 4:
        return show(hosts)
    return f"{len(hosts)} hosts: {show(hosts[:2])}, ..."


def state(run: RecordedRun) -> str:
    """How far the run is, and how it ended."""
    steps = number(run.steps)
    at = f"{run.step:,}" if math.isnan(steps) else f"{run.step:,} of {steps:,.0f}"
    unrecorded = "all steps done" if run.step >= steps else "running, or ended without a record"
    return f"{how_it_ended(run) or unrecorded}: step {at}"


def how_it_ended(run: RecordedRun) -> str:
    """How the run ended, by its last record; empty if that records no end."""
    if run.newest.get("kind") != "end":
        return ""
    reason = run.newest.get("reason")
    return "complete" if reason == "complete" else f"stopped by {show(reason)}"


def losses(label: str, run: RecordedRun, domains: Sequence[str]) -> Table:
    """First and last losses, reference, gap, weights and tokens of each domain."""
    used = data_used(run)
    total = sum(used.values())
    header = (
        *("domain", "first loss", "last loss", "reference", "gap"),
        *("first weight", "last weight", "tokens used", "fraction used"),
    )
    began = mapping(run.records["start"], 0, "domain_weights")
    rows = []
    for name in domains:
        loss, weight = (series(run, "evaluation", f, name)[1] for f in ("losses", "domain_weights"))
        if not len(loss) and not len(weight) and name not in used:
            continue
        tokens = used.get(name, math.nan)
        rows.append(
            (
                *(name, *_ends(loss)),
                show(last(run, "evaluation", "references", name), ".4f"),
                show(last(run, "evaluation", "gaps", name), "+.4f"),
                *_ends([number(began[name]), *weight] if name in began else weight),
                show(tokens, ",.0f"),
                show(tokens / total, ".1%") if total else NONE,
            )
        )
    return Table(label, header, rows)


def _ends(values: Sequence[float] | np.ndarray) -> tuple[str, str]:
    first, *rest = [show(float(value), ".4f") for value in values] or [NONE]
    return first, rest[-1] if rest else first


def masks(label: str, run: RecordedRun) -> Table:
    """Units kept, sparsities and multipliers of each constraint."""
    newest = run.last("step")
    kept = mapping(run.last("evaluation"), "kept")
    counts = {name: [sum(row) for row in rows] for name, rows in run.masks.items()} or kept
    sparsity, target = mapping(newest, "sparsity"), mapping(newest, "target_sparsity")
    rows = []
    for name in dict.fromkeys([*sparsity, *counts]):
        units = len(run.masks[name][0]) if run.masks.get(name) else None
        amounts = [n for n in counts.get(name) or [] if not math.isnan(number(n))]
        of = f" of {units:,}" if units else ""
        now, wanted = number(sparsity.get(name)), number(target.get(name))
        lambdas = [_mean(mapping(newest, "multipliers").get(name), at) for at in (0, 1)]
        rows.append(
            (
                name,
                f"{_range(amounts)}{of}" if amounts else NONE,
                *(show(value, ".4f") for value in (now, wanted)),
                show(now - wanted, "+.4f"),
                *(show(value, "+.3f") for value in lambdas),
            )
        )
    header = ("mask", "units kept, of each row", "expected sparsity", "target", "difference")
    return Table(label, (*header, "λ1, mean of rows", "λ2, mean of rows"), rows)


def _range(amounts: Sequence[int]) -> str:
    low, high = min(amounts), max(amounts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _mean(multipliers: Any, at: int) -> float:
    try:
        return float(np.mean([float(value) for value in multipliers[at]]))
    except (TypeError, ValueError, LookupError):
        return math.nan


def times(run: RecordedRun) -> dict[str, str]:
    """Durations, and their fractions of the whole."""
    spent = time_spent(run)
    total = sum(spent.values())
    return {what: f"{duration(s)} ({s / total:.1%})" for what, s in spent.items()}


SIZES = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("ffn_hidden_size", "vocab_size", "tied_embeddings"),
)


def shapes(label: str, run: RecordedRun) -> dict[str, dict[str, str]]:
    """Columns of sizes and parameters: the model's, and in stage prune the target's."""
    start, config = run.start, run.config
    model = mapping(start, "source") or mapping(config, "model")
    target = mapping(start, "target") or mapping(config, "target")
    found = {}
    for name, shape, parameters in (
        (f"{label}: source" if target else label, model, start.get("parameters")),
        (f"{label}: target", target, start.get("target_parameters")),
    ):
        sizes = {size: show(shape[size]) for size in SIZES if shape.get(size) is not None}
        if parameters is not None:
            sizes["parameters"] = show(parameters)
        if sizes:
            found[name] = sizes
    return found


def events(label: str, run: RecordedRun) -> Table:
    """Starts, resumes and ends by time."""
    rows = []
    for kind in ("start", "end"):
        for record in run.records[kind]:
            when = seconds_since_1970(record.get("time"))
            what = "end" if kind == "end" else "resume" if record["step"] else "start"
            detail = record.get("reason") if kind == "end" else _where(record)
            cells = (what, show(record.get("time")), f"{record['step']:,}", show(detail))
            rows.append((when if when == when else math.inf, cells))
    header = ("event", "time (UTC)", "step", "")
    by_time = sorted(rows, key=lambda row: row[0])
    return Table(label, header, [cells for _, cells in by_time], words=True)


def _where(start: Mapping[str, Any]) -> str:
    parts = [show(start.get("device")), f"hosts {show(start.get('hosts'))}"]
    parts.append(f"layout {show(mapping(start, 'layout'))}")
    return "; ".join(parts + ([f"job {show(start['job'])}"] if start.get("job") else []))


def versions(run: RecordedRun) -> dict[str, str]:
    """Versions of the packages at the last start."""
    return {show(name): show(version) for name, version in mapping(run.start, "versions").items()}
