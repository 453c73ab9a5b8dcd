"""The checkpoints of a run: saved atomically by all ranks or none, and found after a crash."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megashear.checkpoint import checksums
from megashear.checkpoint.atomic import flush_tree
from megashear.checkpoint.info import INFO, LATEST, MASKS_FILE, CheckpointInfo, read_info, versions
from megashear.checkpoint.torch_dist.background import Writing
from megashear.checkpoint.torch_dist.optimizer import load_optimizer_state, optimizer_state
from megashear.checkpoint.torch_dist.state import fill_from_checkpoint, load, sharded_weights
from megashear.config.loader import DOMAINS_FILE
from megashear.errors import CheckpointError
from megashear.files import flush, write_durably
from megashear.platform.collectives import on_each_process, on_first_process
from megashear.platform.parallel import Platform
from megashear.platform.random_states import random_states, restore_random_states


@dataclasses.dataclass(frozen=True)
class _Saving:
    """A checkpoint that is being written: its hidden directory, its writer, its final directory."""

    partial: Path
    writing: Writing
    final: Path


class CheckpointManager:
    """Saves and loads the checkpoints of one run; its methods are collectives over all ranks."""

    def __init__(self, run_dir: Path, platform: Platform, keep: int) -> None:
        self.directory = run_dir / "checkpoints"
        self.platform = platform
        self.keep = keep
        self._saving: _Saving | None = None
        self._removal = threading.Thread()  # of what is kept no longer; on the first rank

    def save(
        self,
        info: CheckpointInfo,
        chunks: Sequence[Any],
        optimizer: Any,
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Begin to write a checkpoint under a hidden name; `finish` renames it.

        It holds the state at the time of this call, while training continues.

        Args:
            info: its description; its step names the directory.
            chunks: this rank's part of the model.
            optimizer: Megatron-Core's.
            tensors: small state, equal on every rank (masks and their optimizer).

        Raises:
            CheckpointError: a rank cannot write; the partial checkpoint is removed.
        """
        assert self._saving is None, "the last checkpoint is still being written"
        self._wait_for_removal()
        final = self.directory / f"step-{info.step:08d}"
        partial = final.with_name(f".{final.name}.partial")
        info = dataclasses.replace(info, versions=versions(), directory=final)
        with self._removed_on_failure(partial):
            on_first_process(lambda: _make_empty(partial))
            on_each_process(lambda: self._write_small_files(partial, info, tensors))
            weights = sharded_weights(chunks)
            moments = optimizer_state(weights, optimizer)
            parts = {partial / "model": weights, partial / "optimizer": moments}
            self._saving = _Saving(partial, Writing(parts), final)

    def _write_small_files(
        self, partial: Path, info: CheckpointInfo, tensors: Mapping[str, Tensor]
    ) -> None:
        """Write the shared files on the first rank, and this rank's random states."""
        if self.platform.rank == 0:
            (partial / INFO).write_text(info.to_json())
            if tensors:
                _write_tensors(partial / MASKS_FILE, dict(tensors))
        states, plain = random_states(self.platform.device)
        plain["place"] = self.platform.layout_rank
        _write_tensors(self._random_file(partial), states, plain)

    def _random_file(self, directory: Path) -> Path:
        return directory / "random" / f"rank-{self.platform.rank:05d}.safetensors"

    def poll(self) -> Path | None:
        """Finish the current save if all ranks have written; return what `finish` returns."""
        if self._saving and not self.platform.largest(not self._saving.writing.done()):
            return self._complete(self._saving)
        return None

    def finish(self) -> Path | None:
        """Wait for the current save, rename it, move `latest`, and remove old checkpoints.

        Returns:
            The checkpoint, or None if no save was running.

        Raises:
            CheckpointError: a rank could not write; the partial checkpoint is removed.
        """
        checkpoint = self._complete(self._saving) if self._saving else None
        self._wait_for_removal()
        return checkpoint

    def _complete(self, saving: _Saving) -> Path:
        self._saving = None
        mark = self.platform.heartbeat.mark
        with self._removed_on_failure(saving.partial):
            mark("writing of a checkpoint")
            sums = saving.writing.finish()
            mark("sealing of a checkpoint")
            known = {str(file.relative_to(saving.partial)): sum for file, sum in sums.items()}
            checksums.seal(saving.partial, known)
            on_first_process(lambda: self._publish(saving.partial, saving.final))
        return saving.final

    @contextmanager
    def _removed_on_failure(self, partial: Path) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if self.platform.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"{partial}: cannot be written: {error}") from error

    def _publish(self, partial: Path, final: Path) -> None:
        flush_tree(partial)
        shutil.rmtree(final, ignore_errors=True)  # damaged, or never named by `latest`
        os.replace(partial, final)
        flush(self.directory)
        write_durably(self.directory / LATEST, final.name + "\n", CheckpointError)
        self._remove_old(final)

    def _remove_old(self, newest: Path) -> None:
        """Remove all but the newest checkpoints, and what killed saves have left."""
        # A later one that `latest` never named must not be kept in place of this one.
        saved = sorted(path for path in self.directory.glob("step-*") if path.name <= newest.name)
        for old in saved[: -self.keep]:
            os.replace(old, old.with_name(f".{old.name}.partial"))  # no half of it under its name
        left = list(self.directory.glob(".step-*.partial"))
        # In the background: removing many gigabytes takes a file system seconds.
        self._removal = threading.Thread(target=_remove, args=left)
        self._removal.start()

    def _wait_for_removal(self) -> None:
        if self._removal.is_alive():
            self._removal.join()

    def latest(self) -> CheckpointInfo | None:
        """Return the checkpoint that `latest` names; None if the run has not saved yet."""
        if not (self.directory / LATEST).is_file():
            return None
        return read_info(self.directory.parent)

    def newest_whole(self) -> tuple[CheckpointInfo | None, str]:
        """Return the checkpoint to resume from: `latest`, or the newest undamaged one.

        Returns:
            The checkpoint, or None if the run has not saved yet; and what is wrong with those that
            were passed over.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        named, candidates = on_first_process(self._candidates)
        wrong = []
        if named not in candidates and (named or candidates):
            what = f"names {named}, which is not there" if named else "missing"
            wrong.append(f"{self.directory / LATEST}: {what}")
        for name in candidates:
            directory = self.directory / name
            lines = checksums.damage(directory)
            if not lines:
                if wrong:
                    wrong.append(f"Resuming from the newest undamaged checkpoint, {directory}")
                else:  # the last save of a run has none after it that would
                    on_first_process(functools.partial(self._remove_old, directory))
                    self._wait_for_removal()
                return read_info(directory), "\n".join(wrong)
            wrong.append(f"{directory}: damaged:\n  " + "\n  ".join(lines))
        if not wrong:
            return None, ""
        wrong.append(
            f"No checkpoint in {self.directory} is whole. Restore one, or remove "
            f"{self.directory.parent} to begin the run again"
        )
        raise CheckpointError("\n".join(wrong))

    def _candidates(self) -> tuple[str, list[str]]:
        """Return the name in `latest`, and all checkpoints: that one first, then the newest."""
        run_dir = self.directory.parent
        if (run_dir / DOMAINS_FILE).is_file() and not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} is gone, and the run has saved there. Restore it, or remove "
                f"{run_dir} to begin the run again"
            )
        latest = self.directory / LATEST
        named = latest.read_text(errors="replace").strip() if latest.is_file() else ""
        saved = sorted((path.name for path in self.directory.glob("step-*")), reverse=True)
        return named, sorted(saved, key=lambda name: name != named)

    def load(
        self, info: CheckpointInfo, chunks: Sequence[Any], optimizer: Any
    ) -> dict[str, Tensor]:
        """Fill the model and the optimizer from a checkpoint; return its small tensors.

        Raises:
            CheckpointError: it is damaged, or parts of it are missing.
        """
        fill_from_checkpoint(info, chunks)
        state = optimizer_state(sharded_weights(chunks), optimizer)
        loaded = load(state, info.directory / "optimizer")
        load_optimizer_state(state, loaded, optimizer, info.step)
        file = info.directory / MASKS_FILE
        try:
            return load_file(file) if info.stage == "prune" else {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: damaged: {error}") from error

    def restore_random_states(self, info: CheckpointInfo) -> None:
        """Restore this rank's random states if the layout is the same; else keep the seeded ones.

        Raises:
            CheckpointError: they are damaged.
        """
        file = self._random_file(info.directory)
        if not file.is_file():
            return
        try:
            with safe_open(file, "pt") as states:
                plain = states.metadata()
                device = "cuda" if "cuda" in states.keys() else "cpu"  # noqa: SIM118
                same_device = device == self.platform.device.type
                if same_device and plain["place"] == self.platform.layout_rank:
                    tensors = {name: states.get_tensor(name) for name in states.keys()}  # noqa: SIM118
                    restore_random_states(tensors, plain, self.platform.device)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file}: damaged: {error}") from error


def _remove(*directories: Path) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)  # what stays goes with the next save


def _make_empty(directory: Path) -> None:
    _remove(directory)
    (directory / "random").mkdir(parents=True)


def _write_tensors(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    try:
        save_file(tensors, file, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file.name}: {error}") from error
    # safetensors writes for the owner alone; a checkpoint is as readable as its folder.
    file.chmod(file.parent.stat().st_mode & 0o666)
