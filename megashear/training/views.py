"""Show a run's records in TensorBoard and Weights & Biases.

Both are optional, and a failure of either does not stop a run. Only this module imports them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from megashear.config.schema import RunConfig
from megashear.files import write_whole

_WAIT = 30.0
"""Seconds to wait for a server at the start and at the end of a run."""


class View(Protocol):
    """Shows the records of metrics.jsonl."""

    def take(self, record: Mapping[str, Any]) -> None:
        """Show a record."""

    def close(self) -> None:
        """Show what remains, and end."""


def views(
    config: RunConfig, resumed_step: int | None, warn: Callable[[str], None]
) -> Iterator[View]:
    """Open the views that `log` asks for; one that fails warns once and ends.

    Args:
        config: configuration of the run; the packages of its views are installed.
        resumed_step: step that the run resumes from; None in a new run.
        warn: prints a warning.
    """
    if config.log.tensorboard:
        yield Guarded("TensorBoard", lambda: TensorBoard(config, resumed_step), warn)
    if config.log.wandb != "disabled":
        yield Guarded("W&B", lambda: WeightsAndBiases(config, resumed_step), warn)


class Guarded:
    """A view whose failure does not stop the run."""

    def __init__(self, name: str, make: Callable[[], View], warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._view: View | None = None
        with self._guarded():
            self._view = make()

    def take(self, record: Mapping[str, Any]) -> None:
        """Show a record, unless the view has failed."""
        with self._guarded():
            if self._view is not None:
                self._view.take(record)

    def close(self) -> None:
        """Show what remains, and end."""
        with self._guarded():
            if self._view is not None:
                self._view.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # no failure of a view is worth a run
            self._view = None
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            text = f"{self._name} failed, and the run goes on without it: {what}"
            self._warn(f"{text}. metrics.jsonl has every record")


class TensorBoard:
    """Event files in RUN/tensorboard; steps that a resumed run repeats replace the old ones."""

    def __init__(self, config: RunConfig, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = 0 if resumed_step is None else resumed_step + 1
        directory = Path(config.run_dir) / "tensorboard"
        self._writer = SummaryWriter(str(directory), purge_step=purge)

    def take(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of a record."""
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])
        if record["kind"] == "save":  # a run that resumes from it adds only later steps
            self._writer.flush()

    def close(self) -> None:
        """Write what remains."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run with its id in RUN/wandb-id; the x axis is `step`."""

    def __init__(self, config: RunConfig, resumed_step: int | None) -> None:
        import wandb

        run_dir = Path(config.run_dir)
        file = run_dir / "wandb-id"
        if resumed_step is None or not file.is_file():
            write_whole(file, uuid.uuid4().hex[:8] + "\n")
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=run_dir.name,
            group=run_dir.parent.name,
            job_type=config.stage,
            config=asdict(config),
            dir=str(run_dir),
            id=file.read_text().strip(),
            resume="allow",
            mode=config.log.wandb,  # type: ignore[arg-type]
            # W&B's console capture would come between the run and its terminal, or wait for a key.
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=_WAIT,
                login_timeout=_WAIT,
                finish_timeout=_WAIT,
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def take(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a record; a repeated step is there twice, with equal values."""
        if values := dict(scalars(record)):
            self._run.log({**values, "step": record["step"]})

    def close(self) -> None:
        """Send what remains, for half a minute at most."""
        self._run.finish()


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record by name: `step/loss`, `evaluation/seconds`, `losses/cc`.

    A number of the record itself is named after the record's kind, a number of a domain, mask or
    constraint after its field. The rows of a mask are shown as their mean.
    """
    if record["kind"] not in ("step", "evaluation", "save"):
        return
    for field, value in record.items():
        if isinstance(value, int | float) and field not in ("step", "time"):
            yield f"{record['kind']}/{field}", value
        elif field == "multipliers":
            for name, pair in value.items():
                for number, rows in enumerate(pair, 1):
                    yield f"multipliers/{name}/lambda{number}", sum(rows) / len(rows)
        elif field == "kept":
            yield from ((f"kept/{name}", sum(rows) / len(rows)) for name, rows in value.items())
        elif isinstance(value, dict) and not (
            record["kind"] == "step" and field == "domain_weights"
        ):
            # Weights move at evaluations, whose record is of the same step as the last of the old.
            yield from ((f"{field}/{name}", number) for name, number in value.items())
