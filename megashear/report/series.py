"""Numbers from the records of a run. Nothing is drawn here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megashear.records import METRICS
from megashear.report.runs import RecordedRun

Series = tuple[NDArray[Any], NDArray[np.float64]]
"""Steps or tokens, and a value at each."""

MAX_POINTS = 1000
"""Points of a line that is drawn: about two for each pixel of a figure."""
STRETCHES = 100
"""Stretches of a noisy line, whose means are drawn over it."""


def number(value: Any) -> float:
    """A finite number as it is, anything else as NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) < 1e300 else math.nan  # false of NaN too


def part(tree: Any, *path: str | int) -> Any:
    """The value at a path of keys and positions; None if there is none."""
    for key in path:
        try:
            tree = tree[key]
        except (LookupError, TypeError):
            return None
    return tree


def mapping(tree: Any, *path: str | int) -> dict[str, Any]:
    """The mapping at a path; an empty one if there is none."""
    found = part(tree, *path)
    return found if isinstance(found, dict) else {}


def series(run: RecordedRun, kind: str, *path: str | int) -> Series:
    """A field over the steps; values that are no numbers are added to `run.problems`."""
    steps, values, wrong = [], [], []
    for record in run.records[kind]:
        found = part(record, *path)
        value = number(found)
        if not math.isnan(value):
            steps.append(record["step"])
            values.append(value)
        elif found is not None:
            wrong.append(record["step"])
    if wrong:
        field = ".".join(map(str, path))
        more = f" and of {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
        text = f"{METRICS}: {kind} {wrong[0]}{more}: {field} is no finite number; left out"
        run.report_problem(text)
    return np.array(steps, np.int64), np.array(values, np.float64)


def last(run: RecordedRun, kind: str, *path: str | int) -> float:
    """The newest number of a field; NaN if there is none."""
    values = (number(part(record, *path)) for record in reversed(run.records[kind]))
    return next((value for value in values if not math.isnan(value)), math.nan)


def thin(line: Series, most: int = MAX_POINTS) -> Series:
    """Reduce a line to the least and the greatest value of each stretch of steps, and the ends.

    All points that remain are points of the line, so that no peak is lost or moved.
    """
    steps, values = line
    if len(steps) <= most:
        return line
    kept = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), most // 2 - 1):
        kept |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    chosen = sorted(kept)
    return steps[chosen], values[chosen]


def means(line: Series) -> Series:
    """The mean of each of STRETCHES equal stretches of steps, at its middle."""
    of_steps, of_values = (np.array_split(each, STRETCHES) for each in line)
    steps = np.array([stretch[len(stretch) // 2] for stretch in of_steps])
    return steps, np.array([stretch.mean() for stretch in of_values])


def is_long(run: RecordedRun) -> bool:
    """Whether its lines are thinned."""
    return len(run.records["step"]) > MAX_POINTS


def labels(directories: Sequence[Path]) -> list[str]:
    """Name each run by the end of its path, as long as needed to distinguish them."""
    paths = [directory.resolve().parts for directory in directories]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def domains(runs: Sequence[RecordedRun]) -> list[str]:
    """Names of domains, in the order in which the runs have them."""
    names: dict[str, None] = {}
    for run in runs:
        for record in run.records["start"] + run.records["evaluation"] + run.records["step"][:1]:
            for field in ("losses", "references", "domain_weights", "domain_losses"):
                names |= dict.fromkeys(mapping(record, field))
    return list(names)


def tokens_per_step(run: RecordedRun) -> float:
    """Tokens per step as the run states them, or as its records imply; NaN if unknown."""
    stated = number(run.start.get("tokens_per_step"))
    steps, tokens = series(run, "step", "tokens")
    if math.isnan(stated) and len(steps) and steps[-1] > 0:
        return float(tokens[-1] / steps[-1])
    return stated


def data_used(run: RecordedRun) -> dict[str, float]:
    """Tokens that were drawn from each domain: the weights of each step times its tokens.

    A step without weights was drawn by those of the evaluation before it.
    """
    each = tokens_per_step(run)
    updates = [(r["step"], mapping(r, "domain_weights")) for r in run.records["evaluation"]]
    used: dict[str, float] = {}
    weights: Mapping[str, Any] = {}
    done, at = 0, 0
    for record in run.records["step"]:
        while at < len(updates) and updates[at][0] < record["step"]:
            weights, at = updates[at][1], at + 1
        drawn = mapping(record, "domain_weights") or weights
        tokens = (record["step"] - done) * each  # of missing records before it too
        done = record["step"]
        for name, weight in drawn.items():
            share = number(weight) * tokens
            used[name] = used.get(name, 0.0) + (0.0 if math.isnan(share) else share)
    return used


def missing_steps(run: RecordedRun) -> str:
    """Describe missing step records between others; empty if there are none."""
    steps = np.array([record["step"] for record in run.records["step"]])
    gaps = np.flatnonzero(np.diff(steps) > 1)
    if not len(gaps):
        return ""
    lost = int(np.sum(np.diff(steps)[gaps] - 1))
    first, last_of_first = steps[gaps[0]] + 1, steps[gaps[0] + 1] - 1
    return f"{METRICS}: no record of {lost:,} steps, the first from {first:,} to {last_of_first:,}"


def seconds_since_1970(text: Any) -> float:
    """Convert a record's time, a number or 2026-11-23T05:40:00Z, to seconds; NaN if neither."""
    if not isinstance(text, str):
        return number(text)
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):
        return math.nan


def time_spent(run: RecordedRun) -> dict[str, float]:
    """Seconds by purpose, in the order of a step; those that were not recorded are left out."""

    def total(kind: str, field: str) -> float:
        return float(series(run, kind, field)[1].sum())

    step, data = total("step", "seconds"), total("step", "data_seconds")
    compute = total("step", "forward_backward_seconds")
    spent = {
        "waiting for data": data,
        "forward and backward": compute,
        "optimizer and rest of the step" if compute else "computation": step - data - compute,
        "evaluation": total("evaluation", "seconds"),
        "saving": total("save", "seconds"),
    }
    running, stopped = _sessions(run)
    spent["start-up and other"] = running - sum(spent.values())
    spent["between starts"] = stopped
    return {what: seconds for what, seconds in spent.items() if seconds > 0}


def _sessions(run: RecordedRun) -> tuple[float, float]:
    """Seconds from each start to the last record before the next one, and seconds between those."""
    starts = sorted(
        time for r in run.records["start"] if (time := seconds_since_1970(r.get("time"))) > 0
    )
    records = run.records["step"] + run.records["end"]
    seen = np.array(starts + [seconds_since_1970(r.get("time")) for r in records])
    running = stopped = 0.0
    for began, following in pairwise([*starts, math.inf]):
        ended = float(np.max(seen, where=(seen >= began) & (seen < following), initial=began))
        running += ended - began
        stopped += following - ended if following < math.inf else 0.0
    return running, stopped
