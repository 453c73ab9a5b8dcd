"""Runs commands in turn and remembers what is done; what is done is not done again.

Imports `errors`, `files` and `console` only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megashear.console import signals_interrupt
from megashear.errors import PlatformError, ShearError
from megashear.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
"""The clone that the scripts lie in."""


def python(*words: str) -> tuple[str, ...]:
    """A command of this Python."""
    return (sys.executable, *words)


def script(file: str, *arguments: str) -> tuple[str, ...]:
    """The command of a script of this repository.

    Raises:
        PlatformError: megashear is installed without its clone.
    """
    if not (ROOT / file).is_file():
        text = f"{ROOT / file} is not there: install megashear from a clone, by pip install -e ."
        raise PlatformError(text)
    return python(str(ROOT / file), *arguments)


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage, and of its log.
        output: file or directory that it makes, below the runner's directory.
        command: what it runs.
        reads: files whose content decides the result.
        settings: what else decides it.
        goes_on: from which outputs that it finds the command itself goes on, or refuses to: `own`
            that it began, also `unknown` ones that no stage here made, or `all`.
    """

    name: str
    output: str
    command: tuple[str, ...]
    reads: tuple[Path, ...] = ()
    settings: str = ""
    goes_on: Literal["own", "unknown", "all"] = "own"

    def fingerprint(self, before: str) -> str:
        """Changes with the command, what decides its result, and everything done before."""
        digest = hashlib.sha256(before.encode())
        digest.update(json.dumps([_short(word, "..") for word in self.command]).encode())
        digest.update(self.settings.encode())
        for file in self.reads:
            digest.update(file.read_bytes())
        return digest.hexdigest()


class Runner:
    """Runs stages, in a directory, and remembers in a folder what is done.

    Args:
        folder: of logs and of what is done; made where it is missing.
        directory: where commands run and outputs lie (default: the folder).
        threads: of each process; None leaves it to them.
        keeps: refuse to do a stage again whose output was made in another way, instead of removing
            that.

    Attributes:
        seconds: wall time of each stage, of the run that did it.
    """

    def __init__(
        self,
        folder: Path,
        directory: Path | None = None,
        *,
        threads: int | None = 1,
        keeps: bool = False,
    ) -> None:
        self.folder, self.threads, self.keeps = folder, threads, keeps
        self.directory = directory or folder
        self.seconds: dict[str, float] = {}
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._markers = folder / "stages"
        self._markers.mkdir(exist_ok=True)

    def run_all(self, stages: Sequence[Stage], only: Sequence[str] = ()) -> None:
        """Run stages in turn, or those of the names in `only`.

        Raises:
            ShearError: one failed, or outputs of other commands stand in the way.
        """
        fingerprints, before = [], ""
        for stage in stages:
            before = stage.fingerprint(before)
            fingerprints.append(before)
        todo = [
            (s, f) for s, f in zip(stages, fingerprints, strict=True) if not only or s.name in only
        ]
        if self.keeps:
            self._refuse_to_replace(todo)
        for number, (stage, fingerprint) in enumerate(todo, 1):
            self._run(stage, fingerprint, f"{number}/{len(todo)}")

    def _refuse_to_replace(self, todo: Sequence[tuple[Stage, str]]) -> None:
        in_the_way = []
        for stage, fingerprint in todo:
            made = self._state(stage).get("fingerprint")
            exists = (self.directory / stage.output).exists()
            taken_up = stage.goes_on == "all" or (stage.goes_on == "unknown" and made is None)
            if exists and made != fingerprint and not taken_up:
                how = "otherwise" if made else "by something else"
                in_the_way.append(f"  {stage.output}  (stage {stage.name}) was made {how}")
        if in_the_way:
            raise ShearError(
                "the commands, settings or inputs of stages have changed since:\n"
                + "\n".join(in_the_way)
                + "\nUndo the changes, or name other places, or remove these to make them again"
            )

    def _state(self, stage: Stage) -> dict[str, object]:
        try:
            state = json.loads((self._markers / f"{stage.name}.json").read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _run(self, stage: Stage, fingerprint: str, number: str) -> None:
        """Run a stage, unless it was run before with the same input; an unfinished one goes on."""
        before = self._state(stage)
        same = before.get("fingerprint") == fingerprint
        spent = float(str(before.get("seconds", 0.0))) if same else 0.0
        output = self.directory / stage.output
        if same and before["done"] and output.exists():
            print(f"[{number}] {stage.name}: done before ({spent:.0f} s)", flush=True)
        else:
            if not same and not self.keeps:
                shutil.rmtree(output, ignore_errors=True)
            print(f"[{number}] {stage.name}", flush=True)
            began = time.perf_counter()
            self._mark(stage, fingerprint, spent, done=False)
            try:
                self._execute(stage)
            finally:
                spent += time.perf_counter() - began
                self._mark(stage, fingerprint, spent, done=False)
            self._mark(stage, fingerprint, spent, done=True)
        self.seconds[stage.name] = spent

    def _mark(self, stage: Stage, fingerprint: str, seconds: float, *, done: bool) -> None:
        state = {"fingerprint": fingerprint, "seconds": seconds, "done": done}
        write_whole(self._markers / f"{stage.name}.json", json.dumps(state))

    def _execute(self, stage: Stage) -> None:
        """Run the command of a stage, its output shown here and kept in the stage's log."""
        log = self.folder / "logs" / f"{stage.name}.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        clone = os.path.relpath(ROOT, self.directory)
        print("    $ " + " ".join(_short(part, clone) for part in stage.command), flush=True)
        process = subprocess.Popen(
            stage.command, cwd=self.directory, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with log.open("w") as stream, signals_interrupt():

            def show() -> None:
                for line in process.stdout or ():
                    stream.write(line)
                    print("    " + line, end="", flush=True)

            try:
                show()
            except KeyboardInterrupt as stop:  # the command saves before it ends
                if stop.args and stop.args[0] != signal.SIGINT:  # Ctrl-C it got too
                    process.send_signal(stop.args[0])
                show()
                process.wait()
                raise
        if process.wait() != 0:
            raise ShearError(
                f"stage {stage.name} failed with status {process.returncode}. Its output is above "
                f"and in {log}"
            )


def _short(part: str, clone: str) -> str:
    """A word of a command without where this machine has Python and the clone."""
    return "python" if part == sys.executable else part.replace(str(ROOT), clone)
