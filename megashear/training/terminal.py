"""Print a run: lines, which also suit a log file, and on a terminal a bar below them."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TextIO

from tqdm import tqdm

from megashear.config.schema import TrainerConfig
from megashear.console import leave_terminal, table


class Terminal:
    """A view of the records on stdout; the bar exists from a start record until `close`."""

    def __init__(self, config: TrainerConfig) -> None:
        self.steps, self.interval = config.steps, config.log_interval
        self._weights: Mapping[str, float] = {}
        self._steps: list[Mapping[str, Any]] = []  # records since the last line
        self._bar: tqdm | None = None

    def take(self, record: Mapping[str, Any]) -> None:
        """Print a record."""
        if record["kind"] == "start":
            self._weights = record["domain_weights"]
            self.say(start_line(record))
            if sys.stdout.isatty():
                what = {"desc": record["stage"], "unit": "step", "total": self.steps}
                self._bar = tqdm(initial=record["step"], file=sys.stdout, leave=False, **what)
                self._bar.dynamic_ncols = _room
        elif record["kind"] == "step":
            self._step(record)
        elif record["kind"] == "evaluation":
            self.say(evaluation_table(record, self._weights))
            self._weights = record["domain_weights"]

    def _step(self, record: Mapping[str, Any]) -> None:
        self._steps.append(record)
        step = record["step"]
        if step == 1 or step % self.interval == 0 or step == self.steps:
            self.say(step_line(self._steps, self.steps))
            self._steps = []
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {record['loss']:.3f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def say(self, text: str, file: TextIO | None = None) -> None:
        """Print above the bar, by default on stdout."""
        file = file or sys.stdout
        with tqdm.external_write_mode(file) if self._bar is not None else nullcontext():
            try:
                print(text, file=file, flush=True)
            except OSError as error:
                if error.errno != errno.EIO:  # the terminal is gone; tqdm handles that too
                    raise
                leave_terminal()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _room(_: object) -> tuple[int, int]:
    """Return columns and lines for a bar, with room for the ^C that a terminal echoes."""
    size = shutil.get_terminal_size()
    return max(size.columns - 4, 10), size.lines


def start_line(record: Mapping[str, Any]) -> str:
    """Describe when and where a run starts, since several jobs may append to one log file."""
    hosts, count = record["hosts"], 1
    for size in record["layout"].values():
        count *= size
    where = ", ".join(hosts) if len(hosts) <= 4 else f"{hosts[0]} and {len(hosts) - 1} more"
    job = f", job {record['job']}" if record["job"] else ""
    return f"{record['time']}  step {record['step']}  {count} x {record['device']} on {where}{job}"


def step_line(records: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Format the steps since the last line: newest values, mean speed."""
    last = records[-1]
    seconds = sum(record["seconds"] for record in records) / len(records)
    width = len(str(steps))
    parts = [f"step {last['step']:>{width}}/{steps}", f"loss {last['loss']:.3f}"]
    if "penalty" in last:
        parts.append(f"penalty {last['penalty']:.3f}")
    parts += [f"grad_norm {last['grad_norm']:.2f}", f"lr {last['lr']:.1e}"]
    if "sparsity" in last:
        target = last["target_sparsity"]
        pairs = [f"{name} {now:.2f}/{target[name]:.2f}" for name, now in last["sparsity"].items()]
        parts.append("sparsity " + " ".join(pairs))
    speed = last["seconds"] / seconds  # mean speed relative to that of the last step
    parts.append(f"tok/s {last['tokens_per_second'] * speed:,.0f}")
    if last["mfu"] is not None:
        parts.append(f"mfu {last['mfu'] * speed:.1%}")
    parts.append(f"mem {last['memory_gib']:.1f}GiB")
    parts.append(f"ETA {tqdm.format_interval((steps - last['step']) * seconds)}")
    return "  ".join(parts)


def evaluation_table(record: Mapping[str, Any], before: Mapping[str, float]) -> str:
    """Format losses (nats per token), references, gaps and the change of weights by domain."""
    rows = []
    for name, loss in record["losses"].items():
        gap = f"{record['gaps'][name]:+.3f}" if name in record["gaps"] else "-"
        reference = f"{record['references'][name]:.4f}" if name in record["gaps"] else "-"
        weight = f"{record['domain_weights'][name]:.3f}"
        if before.get(name, record["domain_weights"][name]) != record["domain_weights"][name]:
            weight = f"{before[name]:.3f} -> {weight}"
        rows.append((name, f"{loss:.4f}", reference, gap, weight))
    text = table(rows, ("domain", "loss", "reference", "gap", "weight"))
    return f"evaluation at step {record['step']}\n  " + text.replace("\n", "\n  ")
