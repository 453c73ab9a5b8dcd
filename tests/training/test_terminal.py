"""What a run prints, into a file and on a terminal, where a bar stays below the lines."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
from typing import Any

import pytest

from megashear.config.schema import TrainerConfig
from megashear.training.terminal import Terminal

START = {
    **{"kind": "start", "step": 0, "stage": "prune", "time": "2026-11-23T05:40:00Z"},
    **{
        "domain_weights": {"cc": 0.7, "github": 0.3},
        "layout": {"tensor": 2, "data": 4},
        "job": "17",
    },
    **{"hosts": ["n1", "n2"], "device": "NVIDIA H100 80GB HBM3"},
}
EVALUATION = {
    **{"kind": "evaluation", "step": 4, "losses": {"cc": 2.10149, "github": 0.8119}},
    **{"references": {"cc": 1.9643}, "gaps": {"cc": 0.13719}},
    **{"domain_weights": {"cc": 0.75, "github": 0.25}},
}


def step(number: int) -> dict[str, Any]:
    """The record of a step that took `number` seconds."""
    return {
        **{"kind": "step", "step": number, "loss": 2.5 - number / 10, "grad_norm": 0.8404},
        **{"lr": 4.7e-5, "seconds": float(number), "tokens_per_second": 1200 / number},
        **{"mfu": 0.6 / number, "memory_gib": 61.23, "penalty": 0.0214},
        **{"sparsity": {"head": 0.181}, "target_sparsity": {"head": 0.19}},
    }


EXPECTED = """\
2026-11-23T05:40:00Z  step 0  8 x NVIDIA H100 80GB HBM3 on n1, n2, job 17
step 1/6  loss 2.400  penalty 0.021  grad_norm 0.84  lr 4.7e-05  sparsity head 0.18/0.19  \
tok/s 1,200  mfu 60.0%  mem 61.2GiB  ETA 00:05
step 4/6  loss 2.100  penalty 0.021  grad_norm 0.84  lr 4.7e-05  sparsity head 0.18/0.19  \
tok/s 400  mfu 20.0%  mem 61.2GiB  ETA 00:06
evaluation at step 4
  domain    loss  reference  gap     weight
  cc      2.1015  1.9643     +0.137  0.700 -> 0.750
  github  0.8119  -          -       0.300 -> 0.250
saved somewhere
step 6/6  loss 1.900  penalty 0.021  grad_norm 0.84  lr 4.7e-05  sparsity head 0.18/0.19  \
tok/s 218  mfu 10.9%  mem 61.2GiB  ETA 00:00
"""


def show() -> Terminal:
    """A run of six steps, that goes on."""
    terminal = Terminal(TrainerConfig(steps=6, log_interval=4))
    for record in (START, *map(step, range(1, 5)), EVALUATION):
        terminal.take(record)
    terminal.say("saved somewhere")
    for number in (5, 6):
        terminal.take(step(number))
    return terminal


def test_lines_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    show()
    assert capsys.readouterr().out == EXPECTED


def screen(written: str) -> str:
    """What a terminal shows, on as many lines as it takes, of text with carriage returns."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown: list[str] = []
        for part in line.split("\r"):
            shown[: len(part)] = part
        lines.append("".join(shown).rstrip())
    return "\n".join(lines)


def read(leader: int) -> str:
    """All that a pseudo-terminal has got."""
    parts = []
    while select.select([leader], [], [], 0.3)[0]:
        parts.append(os.read(leader, 2**16))
    return b"".join(parts).decode()


def test_a_bar_below_the_lines_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the last line, has room for what is echoed behind it, and is gone in the end."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    monkeypatch.setenv("COLUMNS", "100")
    with os.fdopen(follower, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        terminal = show()
        written = read(leader)
        *lines, bar = screen(written).split("\n")
        assert "\n".join(lines) + "\n" == EXPECTED
        assert re.fullmatch(r"prune:.*\| [56]/6 \[.*loss 2.000]", bar)
        assert len(bar) <= 96
        terminal.close()
        written += read(leader)
    os.close(leader)
    assert screen(written) == EXPECTED
