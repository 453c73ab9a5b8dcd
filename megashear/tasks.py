"""Run commands in turn, and remember which are done, so that they are not done again.

Imports `errors`, `files` and `console` only.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megashear.console import signals_interrupt
from megashear.errors import ShearError
from megashear.files import locked, write_whole

SMALL = 2**20
"""Bytes up to which a file is compared by its content, instead of its size and time."""


def python(*words: str) -> tuple[str, ...]:
    """Return a command of this Python."""
    return (sys.executable, *words)


def megashear(*words: str) -> tuple[str, ...]:
    """Return the command of a sub-command."""
    return python("-m", "megashear", *words)


@dataclass(frozen=True)
class Task:
    """One command.

    Attributes:
        name: of the task, and of its log.
        output: file or directory that it makes, below the runner's directory.
        command: what it runs.
        reads: files and directories, made by no other task, whose content decides the result.
        settings: what decides it, instead of the command's words.
        repeats: whether to run it always, since the command skips what is done.
        resumes: whether an output may be unfinished, which the command then completes.
        removes: what to remove before the task is done again with other input (default: output).
    """

    name: str
    output: str
    command: tuple[str, ...]
    reads: tuple[Path, ...] = ()
    settings: Mapping[str, object] | None = None
    repeats: bool = False
    resumes: bool = False
    removes: str | None = None

    def decides(self) -> dict[str, str]:
        """Return what decides its result, except the tasks before it, by name."""
        words = {"command": shown(self.command)}
        given = words if self.settings is None else self.settings
        named = {name: str(value) for name, value in given.items()}
        return named | {str(file): _identity(file) for file in self.reads}


def script(name: str, output: str, file: Path, *arguments: str) -> Task:
    """Return the task of a Python script, which is done again when the script changes."""
    return Task(name, output, python(os.path.relpath(file), *arguments), (file,))


def _identity(path: Path) -> str:
    """Return a digest that changes with what is at a path; for large files, with size and time."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            status = file.stat()
            small = status.st_size <= SMALL
            content = file.read_bytes() if small else str(status.st_mtime_ns).encode()
            digest.update(f"{file.relative_to(path)} {status.st_size} ".encode() + content)
    return digest.hexdigest()[:16]


class TaskRunner:
    """Runs tasks in a directory, and remembers in a folder which are done.

    Args:
        folder: for logs and the records of what is done; made if missing.
        directory: where commands run and outputs are (default: the folder).
        threads: CPU threads of each process; None leaves it to them.
        keeps: refuse to do a task again whose output was made in another way, instead of removing
            that output.

    Attributes:
        seconds: wall time of each task, in the run that did it.
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
        self, tasks: Sequence[Task], only: Sequence[str] = (), *, adopts: bool = False
    ) -> None:
        """Run tasks in turn, or only those named.

        Args:
            tasks: in their order.
            only: names of those to run; empty means all.
            adopts: accept outputs that exist as what these tasks would make.

        Raises:
            ShearError: a task failed, or outputs of other commands are in the way, or another
                process runs tasks in this folder.
        """
        in_use = ShearError(f"{self.folder}: in use by another process")
        with locked(self.folder / "lock", in_use):
            todo, before = [], ""
            outputs = {task.output for task in tasks}
            for task in tasks:
                reads = tuple(file for file in task.reads if str(file) not in outputs)
                decided = {**replace(task, reads=reads).decides(), "": before}
                before = hashlib.sha256(json.dumps(decided).encode()).hexdigest()
                if not only or task.name in only:
                    todo.append((task, decided))
            if adopts:
                self._adopt(todo)
            if self.keeps:
                self._refuse_to_replace(todo)
            for number, (task, decided) in enumerate(todo, 1):
                self._run(task, decided, f"{number}/{len(todo)}")

    def _adopt(self, todo: Sequence[tuple[Task, dict[str, str]]]) -> None:
        for task, decided in todo:
            if (self.directory / task.output).exists():
                self._mark(task, decided, 0.0, done=not task.resumes)

    def _refuse_to_replace(self, todo: Sequence[tuple[Task, dict[str, str]]]) -> None:
        in_the_way = []
        for task, decided in todo:
            made = self._state(task)["decided"]
            exists = (self.directory / task.output).exists()
            if exists and made != decided and not task.repeats:
                why = "not made by this command" if made is None else _difference(made, decided)
                in_the_way.append(f"  {task.output} (task {task.name}): {why}")
        if in_the_way:
            raise ShearError(
                "these outputs are not what the tasks would make:\n"
                + "\n".join(in_the_way)
                + "\nUndo the changes, or name other paths. Or, if the outputs are what you want, "
                "accept them with --adopt"
            )

    def _state(self, task: Task) -> dict[str, Any]:
        state: dict[str, Any] = {"decided": None, "seconds": 0.0, "done": False}
        with contextlib.suppress(OSError, ValueError, TypeError):
            state.update(json.loads((self._markers / f"{task.name}.json").read_text()))
        return state

    def _run(self, task: Task, decided: dict[str, str], number: str) -> None:
        """Run a task, unless it was done with the same input; an unfinished one is continued."""
        before = self._state(task)
        same = before["decided"] == decided
        spent = before["seconds"] if same else 0.0
        output = self.directory / task.output
        if same and before["done"] and output.exists() and not task.repeats:
            print(f"[{number}] {task.name}: done before ({spent:.0f} s)", flush=True)
        else:
            if not same and not self.keeps:
                shutil.rmtree(self.directory / (task.removes or task.output), ignore_errors=True)
            print(f"[{number}] {task.name}", flush=True)
            began = time.perf_counter()
            self._mark(task, decided, spent, done=False)
            try:
                self._execute(task, "a" if same else "w")
            finally:
                spent += time.perf_counter() - began
                self._mark(task, decided, spent, done=False)
            self._mark(task, decided, spent, done=True)
        self.seconds[task.name] = spent

    def _mark(self, task: Task, decided: dict[str, str], seconds: float, *, done: bool) -> None:
        state = {"decided": decided, "seconds": seconds, "done": done}
        write_whole(self._markers / f"{task.name}.json", json.dumps(state))

    def _execute(self, task: Task, mode: str) -> None:
        """Run the command of a task; show its output, and keep it in the task's log."""
        log = self.folder / "logs" / f"{task.name}.log"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        print("    $ " + shown(task.command), flush=True)
        process = subprocess.Popen(
            task.command, cwd=self.directory, env=environment, text=True,
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
                f"task {task.name} failed with status {process.returncode}. Its output is above "
                f"and in {log}"
            )


def shown(command: Sequence[str]) -> str:
    """Return a command as a user would type it: without this machine's path of Python."""
    module = megashear()
    if tuple(command[: len(module)]) == module:
        return shlex.join(["megashear", *command[len(module) :]])
    return shlex.join("python" if word == sys.executable else word for word in command)


def _difference(made: Mapping[str, str], decided: Mapping[str, str]) -> str:
    """Return how a task's input differs from the input of the output that exists."""
    differ = [name for name in {**made, **decided} if made.get(name) != decided.get(name)]
    own = [name for name in differ if name]  # "" stands for the tasks before
    changes = [
        f"{name} has changed" if Path(name).exists() else
        f"{name} was {made.get(name)}, is {decided.get(name)}"
        for name in own[:3]
    ]  # fmt: skip
    more = [f"{len(own) - 3} more"] if len(own) > 3 else []
    return "; ".join([*changes, *more]) or "what it was made of has changed"
