"""The first tables of a report: what came of the runs, and the losses of their models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megashear.report.drawing import Runs, short
from megashear.report.runs import RecordedRun
from megashear.report.series import domains, last, mapping, number, time_spent
from megashear.report.tables import NONE, Table, of_runs, processes, show, state

SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_query_groups": "query groups",
    "ffn_hidden_size": "intermediate",
}
MODELS = {
    "prune": ("source", "pruned"),
    "continue": ("extracted", "continued"),
    "pretrain": ("initial", "from scratch"),
}
"""The models that a stage begins and ends with."""


def runs(runs: Runs) -> Table:
    """What each run came to: model, masks, tokens, hours, mean loss."""
    return of_runs("", runs, _facts, words=True)


def _facts(run: RecordedRun) -> dict[str, str]:
    start = run.start
    hours = sum(time_spent(run).values()) / 3600
    devices = processes(run)
    facts = {
        "stage": _stage(run) or NONE,
        "state": state(run),
        "parameters": _change(start.get("parameters"), start.get("target_parameters")),
        "sizes": ", ".join(_sizes(run)) or NONE,
        "masks": _masks(run),
        "tokens": short(tokens) if (tokens := last(run, "step", "tokens")) > 0 else NONE,
        "hours": f"{hours:,.2f} on {devices} x {show(start.get('device'))}" if hours else NONE,
        "device-hours": f"{hours * devices:,.1f}" if hours else NONE,
    }
    return {fact: value for fact, value in facts.items() if value != NONE}


def _stage(run: RecordedRun) -> str:
    stage = run.start.get("stage", run.config.get("stage"))
    return stage if isinstance(stage, str) else ""


def _change(before: Any, after: Any) -> str:
    texts = [short(number(each)) for each in (before, after) if number(each) > 0]
    return " → ".join(texts) or NONE


def _sizes(run: RecordedRun) -> Iterator[str]:
    """Sizes of the model: one number where pruning does not change it, else both."""
    source, target = mapping(run.start, "source"), mapping(run.start, "target")
    for size, name in SIZES.items():
        before, after = number(source.get(size)), number(target.get(size))
        if before > 0:
            changed = f" → {after:,.0f}" if after > 0 and after != before else ""
            yield f"{name} {before:,.0f}{changed}"


def _masks(run: RecordedRun) -> str:
    """Whether the masks reached their targets."""
    sparsity = mapping(run.last("step"), "sparsity")
    if not sparsity:
        return NONE
    if run.newest.get("kind") == "end" and run.newest.get("reason") == "complete":
        return "OFF TARGET (see the warnings)" if run.newest.get("verdict") else "on target"
    targets = mapping(run.last("step"), "target_sparsity")
    off = [abs(number(value) - number(targets.get(name))) for name, value in sparsity.items()]
    return f"up to {max(off):.3f} off the target of this step"


def losses(runs: Runs) -> Table:
    """Validation losses of the models side by side: source, pruned, continued, reference."""
    columns = {name: values for name, values in _models(runs) if values}
    every = domains(list(runs.values()))
    names = [name for name in every if any(name in column for column in columns.values())]
    rows = [(name, *(show(c.get(name), ".4f") for c in columns.values())) for name in names]
    if len(names) > 1:
        means = [[number(c.get(name)) for name in names] for c in columns.values()]
        rows.append(("mean", *(show(sum(each) / len(each), ".4f") for each in means)))
    title = "Validation loss (nats per token)"
    return Table(title, ("domain", *columns), rows)


def _models(runs: Runs) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, loss by domain) of each model that a run began or ended with, and the references."""
    stages = [_stage(run) for run in runs.values()]
    references: dict[str, Any] = {}
    for label, run in runs.items():
        evaluations, stage = run.records["evaluation"], _stage(run)
        ends = MODELS.get(stage, ("first", "last"))
        prefix = f"{label}: " if stages.count(stage) > 1 else ""
        if evaluations and evaluations[0]["step"] == 0 and stage != "pretrain":
            yield prefix + ends[0], mapping(evaluations[0], "losses")
        if evaluations and evaluations[-1]["step"] > 0:
            unfinished = "" if run.newest.get("reason") == "complete" else " so far"
            yield f"{prefix}{ends[1]}{unfinished}", mapping(evaluations[-1], "losses")
            references |= mapping(evaluations[-1], "references")
    yield "reference", references
