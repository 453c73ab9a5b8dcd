"""Stopping a run gracefully: the signals that request it, and the agreement of all ranks on one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megashear import console
from megashear.platform.parallel import Platform

STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""Signals that request a graceful stop with a checkpoint, lowest number first."""


class StopSignals:
    """Catches STOP_SIGNALS; all ranks agree on one, since they receive it at different moments.

    Attributes:
        received: number of the newest signal that this process received; 0 for none.
        agreed: number of the signal that stops the run, the same on all ranks; 0 for none.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self.received = self.agreed = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals inside the block. Under nohup SIGHUP stays ignored."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        if before[signal.SIGHUP] == signal.SIG_IGN:
            del before[signal.SIGHUP]

        def receive(number: int, frame: Any) -> None:
            self.received = number
            if number == signal.SIGHUP:
                console.leave_terminal()  # it takes no messages any more

        for number in before:
            signal.signal(number, receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def sum_with(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Sum totals over all ranks; in the same collective, count the ranks with each signal.

        A signal that comes later counts in the next call, or in `sync`.

        Returns:
            The sums, and the number of ranks by signal, [len(STOP_SIGNALS)], for `agree`.
        """
        ranks = totals.new_zeros(len(STOP_SIGNALS))
        if self.received:
            ranks[STOP_SIGNALS.index(signal.Signals(self.received))].fill_(1)
        flat = self._platform.sum_over_all(torch.cat([totals.flatten(), ranks]))
        sums, ranks = flat.split([totals.numel(), len(STOP_SIGNALS)])
        return sums.view_as(totals), ranks

    def agree(self, ranks: Tensor) -> None:
        """Agree on the highest signal that any rank received, given what `sum_with` returned."""
        got = [number for number, count in zip(STOP_SIGNALS, ranks.tolist(), strict=True) if count]
        self.agreed = max(got, default=0)

    def sync(self) -> None:
        """Agree by a collective of its own, where all ranks have waited for the device anyway."""
        self.agreed = max(self.agreed, self._platform.largest(self.received))
