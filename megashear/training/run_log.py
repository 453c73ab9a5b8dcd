"""The record of a run: metrics.jsonl, and the console as a view of it. Only rank 0 writes.

Every line of metrics.jsonl is a JSON object with `kind` (step or evaluation) and `step`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megashear.checkpoint.manager import write_durably
from megashear.console import table
from megashear.errors import PlatformError
from megashear.files import flush


class RunLog:
    """Appends to metrics.jsonl and prints a line of progress.

    Args:
        run_dir: of the run.
        steps: of the whole run.
        writes: whether this process writes (rank 0); the others are silent.
        resumed_step: records of later steps are dropped, since these steps are done again; None
            where the run begins, which drops all.
    """

    def __init__(self, run_dir: Path, steps: int, writes: bool, resumed_step: int | None) -> None:
        self.file = run_dir / "metrics.jsonl"
        self.steps = steps
        self.writes = writes
        self._shown: list[Mapping[str, Any]] = []  # records since the last console line
        if writes:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise PlatformError(f"run_dir {run_dir} cannot be made: {error}") from error
            self._drop_after(resumed_step)

    def _drop_after(self, step: int | None) -> None:
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text(errors="replace").splitlines():
            try:
                keep = step is not None and json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError):
                continue  # a line cut by a crash belongs to a step that is done again
            if keep:
                kept.append(line + "\n")
        write_durably(self.file, "".join(kept))

    def flush(self) -> None:
        """Make the records survive a crash of the machine, before a checkpoint does.

        A run that is resumed from it makes those of later steps alone.
        """
        if self.writes and self.file.exists():  # not before the first record
            flush(self.file)
            flush(self.file.parent)

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            with self.file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise PlatformError(f"{self.file} cannot be written: {error}") from error

    def say(self, text: str) -> None:
        """Print a message once."""
        if self.writes:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a message once, on stderr."""
        if self.writes:
            print(text, file=sys.stderr, flush=True)

    def step(self, record: Mapping[str, Any], *, show: bool) -> None:
        """Record a training step, and show it where a logging interval ends."""
        if not self.writes:
            return
        self._append({"kind": "step", **record})
        self._shown.append(record)
        if show:
            print(step_line(self._shown, self.steps), flush=True)
            self._shown = []

    def evaluation(
        self,
        record: Mapping[str, Any],
        losses: Mapping[str, float],
        references: Mapping[str, float],
        before: Sequence[float],
        after: Sequence[float],
    ) -> None:
        """Record and show an evaluation: losses (nats per token), references, domain weights.

        `record` has its step and seconds.
        """
        if not self.writes:
            return
        gaps = {
            name: loss - references[name] for name, loss in losses.items() if name in references
        }
        weights = dict(zip(losses, after, strict=True))
        values = {"losses": losses, "references": references, "gaps": gaps, "weights": weights}
        self._append({"kind": "evaluation", **record, **values})
        rows = []
        for (name, loss), old, new in zip(losses.items(), before, after, strict=True):
            gap = f"{gaps[name]:+.3f}" if name in gaps else "-"
            moved = f"{old:.3f} -> {new:.3f}" if old != new else f"{new:.3f}"
            reference = f"{references[name]:.4f}" if name in gaps else "-"
            rows.append((name, f"{loss:.4f}", reference, gap, moved))
        print(f"evaluation at step {record['step']}")
        header = ("domain", "loss", "reference", "gap", "weight")
        print("  " + table(rows, header).replace("\n", "\n  "), flush=True)


def step_line(records: Sequence[Mapping[str, Any]], steps: int) -> str:
    """One console line of the steps since the last one: the newest values, at their mean speed."""
    last = records[-1]
    seconds = sum(record["seconds"] for record in records) / len(records)
    width = len(str(steps))
    parts = [f"step {last['step']:>{width}}/{steps}", f"loss {last['loss']:.3f}"]
    if last["penalty"] is not None:
        parts.append(f"penalty {last['penalty']:.3f}")
    parts += [f"grad_norm {last['grad_norm']:.2f}", f"lr {last['lr']:.1e}"]
    if "sparsity" in last:
        target = last["target_sparsity"]
        pairs = [f"{name} {now:.2f}/{target[name]:.2f}" for name, now in last["sparsity"].items()]
        parts.append("sparsity " + " ".join(pairs))
    parts.append(f"tok/s {last['tokens_per_second'] * last['seconds'] / seconds:,.0f}")
    parts.append(f"mem {last['memory_gib']:.1f}GiB")
    parts.append(f"ETA {_duration((steps - last['step']) * seconds)}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
