"""Runs commands in turn and remembers what is done; what is done is not done again.

Imports `errors`, `files` and `console` only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.console import signals_interrupt
from megashear.errors import PlatformError, ShearError
from megashear.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
"""The clone that the scripts lie in."""
SMALL = 2**20
"""Bytes of a file whose content is looked at, to see whether it has changed."""


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
        reads: files and directories outside whose content decides the result.
        settings: what decides it in place of the command's words.
        repeats: whether to run it always, since the command knows itself what is done.
        resumes: whether an output may be unfinished, and the command goes on with it.
    """

    name: str
    output: str
    command: tuple[str, ...]
    reads: tuple[Path, ...] = ()
    settings: Mapping[str, object] | None = None
    repeats: bool = False
    resumes: bool = False

    def decides(self) -> dict[str, str]:
        """What decides its result besides the stages before, by name."""
        words = {"command": shlex.join(short(self.command, ".."))}
        given = words if self.settings is None else self.settings
        named = {name: str(value) for name, value in given.items()}
        return named | {str(file): _identity(file) for file in self.reads}


def _identity(path: Path) -> str:
    """Changes with what is at a path; of large files with their sizes and times."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            status = file.stat()
            small = status.st_size <= SMALL
            content = file.read_bytes() if small else str(status.st_mtime_ns).encode()
            digest.update(f"{file.relative_to(path)} {status.st_size} ".encode() + content)
    return digest.hexdigest()[:16]


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

    def run_all(
        self, stages: Sequence[Stage], only: Sequence[str] = (), *, adopts: bool = False
    ) -> None:
        """Run stages in turn, or those of the names in `only`.

        Args:
            stages: in their order.
            only: names of those to run; empty is all.
            adopts: take outputs that are there for what these stages would make.

        Raises:
            ShearError: one failed, or outputs of other commands stand in the way, or another
                process runs stages in this folder.
        """
        with (self.folder / "lock").open("a") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process
            except OSError as error:
                raise ShearError(f"{self.folder}: in use by another process: {error}") from error
            todo, before = [], ""
            for stage in stages:
                decided = {**stage.decides(), "": before}
                before = hashlib.sha256(json.dumps(decided).encode()).hexdigest()
                if not only or stage.name in only:
                    todo.append((stage, decided))
            if adopts:
                self._adopt(todo)
            if self.keeps:
                self._refuse_to_replace(todo)
            for number, (stage, decided) in enumerate(todo, 1):
                self._run(stage, decided, f"{number}/{len(todo)}")

    def _adopt(self, todo: Sequence[tuple[Stage, dict[str, str]]]) -> None:
        for stage, decided in todo:
            if (self.directory / stage.output).exists():
                self._mark(stage, decided, 0.0, done=not stage.resumes)

    def _refuse_to_replace(self, todo: Sequence[tuple[Stage, dict[str, str]]]) -> None:
        in_the_way = []
        for stage, decided in todo:
            made = self._state(stage)["decided"]
            exists = (self.directory / stage.output).exists()
            if exists and made != decided and not stage.repeats:
                why = "not made by this command" if made is None else _difference(made, decided)
                in_the_way.append(f"  {stage.output} (stage {stage.name}): {why}")
        if in_the_way:
            raise ShearError(
                "what is there is not what these stages would make:\n"
                + "\n".join(in_the_way)
                + "\nUndo the changes, or name other places. Or, where these are what you want all "
                "the same, take them as they are, by --adopt"
            )

    def _state(self, stage: Stage) -> dict[str, Any]:
        state: dict[str, Any] = {"decided": None, "seconds": 0.0, "done": False}
        with contextlib.suppress(OSError, ValueError, TypeError):
            state.update(json.loads((self._markers / f"{stage.name}.json").read_text()))
        return state

    def _run(self, stage: Stage, decided: dict[str, str], number: str) -> None:
        """Run a stage, unless it was run before with the same input; an unfinished one goes on."""
        before = self._state(stage)
        same = before["decided"] == decided
        spent = before["seconds"] if same else 0.0
        output = self.directory / stage.output
        if same and before["done"] and output.exists() and not stage.repeats:
            print(f"[{number}] {stage.name}: done before ({spent:.0f} s)", flush=True)
        else:
            if not same and not self.keeps:
                shutil.rmtree(output, ignore_errors=True)
            print(f"[{number}] {stage.name}", flush=True)
            began = time.perf_counter()
            self._mark(stage, decided, spent, done=False)
            try:
                self._execute(stage, "a" if same else "w")
            finally:
                spent += time.perf_counter() - began
                self._mark(stage, decided, spent, done=False)
            self._mark(stage, decided, spent, done=True)
        self.seconds[stage.name] = spent

    def _mark(self, stage: Stage, decided: dict[str, str], seconds: float, *, done: bool) -> None:
        state = {"decided": decided, "seconds": seconds, "done": done}
        write_whole(self._markers / f"{stage.name}.json", json.dumps(state))

    def _execute(self, stage: Stage, mode: str) -> None:
        """Run the command of a stage, its output shown here and kept in the stage's log."""
        log = self.folder / "logs" / f"{stage.name}.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        clone = os.path.relpath(ROOT, self.directory)
        print("    $ " + " ".join(short(stage.command, clone)), flush=True)
        process = subprocess.Popen(
            stage.command, cwd=self.directory, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with log.open(mode) as stream, signals_interrupt():

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


def short(command: Sequence[str], clone: str) -> list[str]:
    """A command's words without where this machine has Python and the clone."""
    return [
        "python" if word == sys.executable else word.replace(str(ROOT), clone) for word in command
    ]


def _difference(made: Mapping[str, str], decided: Mapping[str, str]) -> str:
    """What a stage's result is decided by now, and was otherwise."""
    differ = [name for name in {**made, **decided} if made.get(name) != decided.get(name)]
    own = [name for name in differ if name]  # "" stands for the stages before
    told = [
        f"{name} has changed" if Path(name).exists() else
        f"{name} was {made.get(name)}, is {decided.get(name)}"
        for name in own[:3]
    ]  # fmt: skip
    more = [f"{len(own) - 3} more"] if len(own) > 3 else []
    return "; ".join([*told, *more]) or "what it was made of has changed"
