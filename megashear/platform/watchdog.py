"""Ends a run if one of its processes hangs or dies, and reports which one, at which step.

Every process marks what it is about to do. Two threads publish the mark in torch.distributed's
store, read the other ranks' marks and measure the time since then, even while the main thread waits
in a collective for ever. The clocks of different machines are never compared.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megashear.console import LOST, say
from megashear.errors import RankError

GRACE_MINUTES = 1.0
"""torch ends a collective this much later than the watchdog, which names the rank behind."""
_JUDGE, _SILENT = 5.0, 3.5
"""Periods from noticing to judging; periods of silence after which a rank counts as stopped."""


class Heartbeat:
    """What this process is doing. A mark costs microseconds."""

    def __init__(self) -> None:
        # Number of changes so far, optimizer step, what is done, time of the last mark.
        self.now = (0, 0, "start", time.monotonic())
        self.changed = threading.Event()  # set at a change

    def mark(self, doing: str | None = None, step: int | None = None) -> None:
        """Mark what begins, or that it continues; the time-out counts from the last mark."""
        count, last_step, last, _ = self.now
        step = last_step if step is None else step
        doing = doing or last
        changes = (step, doing) != (last_step, last)
        self.now = (count + changes, step, doing, time.monotonic())
        if changes:
            self.changed.set()


def is_lost_connection(error: Exception) -> bool:
    """Whether torch raised this error because another rank is gone or never came."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


@contextmanager
def watching(heartbeat: Heartbeat, timeout_minutes: float, *, speaks: bool) -> Iterator[None]:
    """End the process and name the rank behind if the block makes no progress for the time-out.

    Args:
        heartbeat: marked by the thread that runs the block.
        timeout_minutes: longer than anything between two marks takes.
        speaks: whether this process reports all ranks; the others print one line.

    Raises:
        RankError: the connection to another rank is lost.
    """
    _kill_children_with_parent()
    watchdog = _Watchdog(heartbeat, 60 * timeout_minutes, speaks)
    try:
        yield
    except Exception as error:
        if is_lost_connection(error):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher's: report first
            watchdog.left = ""
            raise RankError(watchdog.judge("a process of the run is lost")) from error
        watchdog.left = f"{type(error).__name__}: {error}".splitlines()[0]
        raise
    finally:
        watchdog.close()


@functools.cache
def _kill_children_with_parent() -> None:
    """Let forks of this process (readers of data, writers of checkpoints) die with it.

    They inherit its connections: as long as one lives, the other ranks do not see it end.
    """
    if sys.platform == "linux":
        prctl, pdeathsig = ctypes.CDLL(None).prctl, 1
        os.register_at_fork(after_in_child=lambda: prctl(pdeathsig, signal.SIGKILL))


class _Watchdog:
    """The two threads of a process, and what it knows about the other ranks."""

    def __init__(self, heartbeat: Heartbeat, timeout: float, speaks: bool) -> None:
        # How this process leaves: None while it runs, else the error of its own or "".
        self.left: str | None = None
        # Published from the time-out on: where this process is stuck, also after it has ended,
        # because others may notice a second or more later.
        self._stuck: dict[str, Any] | None = None
        self._heartbeat, self._timeout, self._speaks = heartbeat, timeout, speaks
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        # Reading a mark takes the store 2.5 us, and every rank reads all: 1/4 of a core at most.
        self._period = max(min(1.0, timeout / 10), 1e-5 * self._size**2)
        self._main, self._closed = threading.get_ident(), threading.Event()
        store: Any = dist.distributed_c10d._get_default_store()
        # A connection of its own: the main thread may wait in the other one, and hold it.
        self._store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        heartbeat.mark("start")
        self._read_at = time.monotonic()
        unknown = {**self._state(), "host": "host unknown"}
        self._states: dict[int, dict[str, Any]] = dict.fromkeys(range(self._size), unknown)
        self._changed_at = dict.fromkeys(range(self._size), self._read_at)
        self._exchanging = threading.Thread(target=self._exchange, daemon=True)
        self._exchanging.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Publish that this rank has left, if the store still answers."""
        self.left = self.left or ""
        self._closed.set()
        self._heartbeat.changed.set()
        self._exchanging.join(2 * self._period)
        if (self.left or self._stuck) and self._size > 1:
            time.sleep(2 * self._period)  # to be read: the store may end with this rank

    def judge(self, what: str) -> str:
        """Return the message: what was noticed, which ranks are behind, where the others are."""
        time.sleep(_JUDGE * self._period)  # a stopped rank is silent, a running one is not
        behind = self._behind()
        where = "; ".join(self._describe(behind)) or "it is not known which rank is behind"
        message = f"step {self._heartbeat.now[1]}: {what}: {where}"
        others = [rank for rank in range(self._size) if rank not in behind]
        if self._speaks:
            message += "".join(f"\n  {line}" for line in self._describe(others))
            message += "\nStart the run again: it goes on from its newest checkpoint"
        return message

    def _watch(self) -> None:
        last, idle = self._heartbeat.now, 0.0
        while not self._closed.wait(self._period):
            # Counted, not measured: a job that its scheduler suspended for a while does not hang.
            idle = idle + self._period if self._heartbeat.now is last else 0.0
            last = self._heartbeat.now
            if idle >= self._timeout and self.left is None:
                self._stuck = {**self._state(), "stuck": True}
                limit = f"platform.timeout_minutes = {self._timeout / 60:.3g}"
                message = self.judge(f"no progress for {idle:.0f} s ({limit})")
                if not self._closed.is_set():
                    say(f"error: {message}")
                    self.close()
                    os._exit(LOST)

    def _exchange(self) -> None:
        """Publish this rank's mark at every change and read all once a period, until closed."""
        closed = False
        while not closed:
            closed = self._closed.is_set()
            try:
                self._store.set(str(self._rank), json.dumps(self._state()))
                if time.monotonic() - self._read_at >= self._period:
                    self._read()
            except RuntimeError:
                return  # the store has ended
            self._heartbeat.changed.wait(self._period)
            self._heartbeat.changed.clear()

    def _state(self) -> dict[str, Any]:
        if self._stuck:
            return self._stuck
        count, step, doing, since = self._heartbeat.now
        code = sys._current_frames()[self._main]
        file = code.f_code.co_filename
        return {
            "host": socket.gethostname(),
            "count": count,
            "step": step,
            "doing": doing,
            "seconds": time.monotonic() - since,  # never twice the same: a sign of life
            "where": f"{code.f_code.co_name} ({os.path.basename(file)}:{code.f_lineno})",
            "waits": "/distributed/" in file,
            "left": self.left,
            "stuck": False,
        }

    def _read(self) -> None:
        keys = [str(rank) for rank in range(self._size)]
        # The store would wait for the key of a rank that has not started.
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        texts = self._store.multi_get(keys)
        self._read_at = time.monotonic()
        for key, text in zip(keys, texts, strict=True):
            rank, state = int(key), json.loads(text)
            if state != self._states[rank]:
                self._states[rank], self._changed_at[rank] = state, self._read_at

    def _behind(self) -> list[int]:
        """Return the ranks that the others wait for, by the strongest sign."""
        running = [rank for rank, state in self._states.items() if state["left"] is None]
        lowest = min((self._states[rank]["count"] for rank in running), default=0)
        last = [rank for rank in running if self._states[rank]["count"] == lowest]
        return (
            [rank for rank, state in self._states.items() if state["left"]]
            or [rank for rank in running if self._is_silent(rank)]
            or [rank for rank in last if not self._states[rank]["waits"]]
            or last
        )

    def _is_silent(self, rank: int) -> bool:
        if self._states[rank]["stuck"]:
            return False
        silent = _SILENT * self._period
        if rank == 0 and time.monotonic() - self._read_at > silent:
            return True  # the store runs on rank 0 and does not answer
        return self._read_at - self._changed_at[rank] > silent

    def _describe(self, ranks: Iterable[int]) -> list[str]:
        """Describe where ranks are, with one text for ranks at the same point."""
        together: dict[tuple[Any, ...], list[int]] = {}
        for rank in ranks:
            state = self._states[rank]
            where = state["where"] if state["left"] is None else state["left"]
            key = (
                state["step"],
                state["doing"],
                self._is_silent(rank),
                state["left"] is None,
                where,
            )
            together.setdefault(key, []).append(rank)
        return [self._describe_group(group) for group in together.values()]

    def _describe_group(self, ranks: list[int]) -> str:
        state, silence = self._states[ranks[0]], time.monotonic() - self._changed_at[ranks[0]]
        hosts = sorted({self._states[rank]["host"] for rank in ranks})
        who = f"{_ranges(ranks)} ({', '.join(hosts) if len(hosts) < 4 else f'{len(hosts)} hosts'})"
        at = f"at step {state['step']} in {state['doing']}"
        if state["left"]:
            return f"{who} ended {at}: {state['left']}"
        if self._is_silent(ranks[0]):
            return f"{who} last heard {silence:.0f} s ago {at}"
        waiting = "" if state["left"] is not None else f", {state['where']}"
        return f"{who} {at} for {state['seconds'] + silence:.0f} s{waiting}"


def _ranges(ranks: Sequence[int]) -> str:
    firsts = [rank for rank in ranks if rank - 1 not in ranks]
    lasts = [rank for rank in ranks if rank + 1 not in ranks]
    pairs = zip(firsts, lasts, strict=True)
    text = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in pairs)
    return f"ranks {text}" if len(ranks) > 1 else f"rank {text}"
