"""What `megashear plan` prints: plain text, in tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megashear import console
from megashear.config.schema import QUERY_HEAD, ModelShape
from megashear.planning.memory import ERROR_TEXT
from megashear.planning.run import RunPlan
from megashear.planning.targets import Proposal, kv_bytes, weight_bytes
from megashear.planning.throughput import LINK_SHARE, MFU, MFU_SOURCE, Cluster
from megashear.pruning.counting import parameter_count

GIB, MAX_LAYOUTS = 2**30, 6
COLUMNS = ("tensor", "pipeline", "virtual", "context", "data", "micro-batch", "recompute")


def run_text(file: Path, plan: RunPlan) -> str:
    """The part of the text for one run."""
    run, facts = plan.run, plan.facts()
    usable, own = f"{facts['usable_bytes'] / GIB:.1f} GiB", facts["configured"]
    lines = [f"{file}: {facts['stage']} on {run.gpus} x {facts['gpu']}"]
    lines.append(f"  model   {parameter_count(run.shape):,} parameters ({_sizes(run.shape)})")
    if (target := facts["target_parameters"]) is not None:
        sizes = f" ({_sizes(run.target)})" if run.target else ""
        lines.append(f"  target  {target:,} parameters{sizes}")
    lines.append(f"  tokens  {run.tokens / 1e9:.3g} B in {facts['steps']:,} steps")
    share = f"{run.evaluation_cost():.1%}" if run.domains else "domains unknown, not counted"
    lines.append(f"  evaluations add {share} to the computation")
    sizes_on_disk = (f"{what} {size / 1e9:.3g} GB" for what, size in facts["disk_bytes"].items())
    lines.append(f"  disk    {', '.join(sizes_on_disk)}")
    if run.config.platform.device == "cpu":
        lines.append("  platform.device = cpu: memory and times are those of GPUs")
    lines += [f"  cannot run as configured: {path} {text}" for path, text in plan.problems]
    if own is not None:
        verdict = "fits" if plan.fits else "DOES NOT FIT"
        lines.append(f"\nmemory of a GPU as configured: {verdict} in {usable}")
        lines.append(_indented([(n, f"{size / GIB:.2f} GiB") for n, size in own["bytes"].items()]))
    lines.append(f"\nlayouts that fit in {usable}, fastest first")
    if not facts["layouts"]:
        return "\n".join([*lines, f"  none: {facts['why_none']}"])
    rows = _rows(facts["layouts"][:MAX_LAYOUTS], own if plan.fits else None)
    lines.append(_indented(rows, (*COLUMNS, "GiB", "tok/s", "hours", "GPU-hours", "")))
    lines.append(f"  the fastest as options: {facts['layouts'][0]['options']}")
    chosen = own if plan.fits else facts["layouts"][0]
    return "\n".join(
        [*lines, *_step(chosen, "as configured" if plan.fits else "in the fastest layout")]
    )


def _step(layout: dict[str, Any], which: str) -> Iterator[str]:
    """The parts of a step's time, the bytes that a rank sends, and the cost of the masks."""
    seconds = layout["seconds_per_step"]
    shares = {name: part / seconds["total"] for name, part in seconds.items() if name != "total"}
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share >= 5e-4)
    sent = {name: size for name, size in layout["sent_bytes_per_step"].items() if size}
    yield f"\na step {which}: {seconds['total']:.3g} s, of which {parts}"
    if sent:
        sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sent.items())
        yield f"  a rank sends {sizes}"
    if seconds["masks"]:
        yield f"  masks make it {layout['mask_overhead']:.2%} longer than without them"


def _rows(
    layouts: Sequence[dict[str, Any]], configured: dict[str, Any] | None
) -> list[tuple[object, ...]]:
    """Rows of layouts, fastest first; the configured one is in its place, and there once."""
    marked = [
        (layout, "") for layout in layouts if configured is None or _row(layout) != _row(configured)
    ]
    marked += [(configured, "configured")] if configured is not None else []
    marked.sort(key=lambda pair: pair[0]["seconds_per_step"]["total"])
    return [(*_row(layout), mark) for layout, mark in marked]


def _row(layout: dict[str, Any]) -> tuple[object, ...]:
    figures = (f"{layout['tokens_per_second']:,.0f}", f"{layout['hours']:,.1f}")
    sizes = (layout[name] for name in COLUMNS)
    return *sizes, f"{layout['bytes']['total'] / GIB:.1f}", *figures, f"{layout['gpu_hours']:,.0f}"


def _sizes(shape: ModelShape) -> str:
    heads = f"{shape.num_attention_heads} heads"
    if shape.num_query_groups != shape.num_attention_heads:
        heads += f" in {shape.num_query_groups} groups"
    sizes = f"{shape.num_layers} layers, hidden {shape.hidden_size}, {heads}"
    return f"{sizes}, intermediate {shape.ffn_hidden_size}"


def _indented(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> str:
    return "\n".join(f"  {line}" for line in console.table(rows, header).splitlines())


def totals_text(files: Sequence[Path], plans: Sequence[RunPlan]) -> str:
    """The chain: each run in its own layout where that fits, else in the fastest that does."""
    rows, sums = [], [0.0, 0.0, 0.0, 0.0]
    for file, plan in zip(files, plans, strict=True):
        chosen = plan.chosen
        hours = plan.run.hours(chosen) if chosen else math.nan
        disk = sum(plan.run.disk_bytes().values())
        values = (plan.run.tokens / 1e9, hours, hours * plan.run.gpus, disk / 1e9)
        sums = [total + value for total, value in zip(sums, values, strict=True)]
        rows.append((str(file), plan.run.gpus, *map(_figure, values)))
    rows.append(("total", "", *map(_figure, sums)))
    header = ("stage", "GPUs", "tokens (B)", "hours", "GPU-hours", "disk (GB)")
    return "the chain, as configured or, where that does not fit, in the fastest layout\n" + (
        _indented(rows, header)
    )


def _figure(value: float) -> str:
    return "fits nowhere" if math.isnan(value) else f"{value:,.1f}"


def assumptions_text(cluster: Cluster, reserve: float) -> str:
    """The assumptions behind the figures."""
    source = MFU_SOURCE if cluster.mfu == MFU else "--mfu"
    return (
        f"assumed: arithmetic at {cluster.mfu:.0%} of the peak ({source}), links and network at "
        f"{LINK_SHARE:.0%}, {cluster.network * 8e-9:g} Gbit/s a GPU (--network), "
        f"{cluster.gpus_per_node} GPUs a node; {reserve:.0%} of the memory left free (--reserve)\n"
        f"memory model: {ERROR_TEXT}; times are a model's, to rank layouts by"
    )


def proposals_text(source: ModelShape, proposals: Sequence[Proposal]) -> str:
    """Target shapes as a table, and as YAML for a run's file."""
    sizes = ("parameters", "layers", "hidden", "heads", "groups", "intermediate")
    header = (*sizes, "tensor", "bf16 GiB", "int4 GiB", "KV KiB/token", "near")
    rows = []
    for each in proposals:
        shape = each.shape
        memory = (f"{weight_bytes(shape, kind) / GIB:.2f}" for kind in ("bf16", "int4"))
        rows.append(
            (
                *(f"{each.parameters:,}", shape.num_layers, shape.hidden_size),
                *(shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size),
                *(",".join(map(str, each.tensor)), *memory),
                *(f"{kv_bytes(shape) / 1024:g}", each.nearest.name),
            )
        )
    lines = [f"source: {parameter_count(source):,} parameters ({_sizes(source)})", ""]
    lines += [
        console.table(rows, header),
        "tensor: tensor-parallel ranks that divide the target",
        "",
    ]
    lines.append("for a run's file, one of:")
    return "\n".join([*lines, *map(_target_lines, proposals)])


def _target_lines(proposal: Proposal) -> str:
    """Return a target as YAML."""
    sizes = ", ".join(f"{name}: {size}" for name, size in vars(proposal.target).items())
    unit = f"\npruning: {{head_unit: {QUERY_HEAD}}}" if proposal.head_unit == QUERY_HEAD else ""
    return f"target: {{{sizes}}}{unit}"
