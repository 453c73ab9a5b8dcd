"""The collectives of this process, counted where all of them pass: c10d's operators.

Whatever calls them (Megatron-Core, its DistributedDataParallel and optimizer, this package), alone,
coalesced or functional, ends in one operator of torch's dispatcher. Counting takes time: not
for a step that is timed.

    with counted() as collectives:
        trainer.train_step()
    sum(c.sent for c in collectives if c.kind == "all-reduce")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "broadcast": "broadcast",
    "alltoall": "all-to-all",
    "send": "send",
    "isend": "send",
    "recv": "receive",
    "irecv": "receive",
}
"""By how an operator's name begins, without underscores; others are called by their names."""


@dataclass(frozen=True)
class Collective:
    """One call.

    Attributes:
        kind: all-reduce, all-gather, reduce-scatter, send, receive, ...
        bytes: of the larger of what goes in and what comes out on this rank.
        size: ranks of the group.
        group: what its maker calls it (Megatron-Core: `TENSOR_MODEL_PARALLEL_GROUP`).
    """

    kind: str
    bytes: int
    size: int
    group: str

    @property
    def sent(self) -> float:
        """Bytes that this rank sends, of a ring where all take part; a message is its sender's."""
        times = {"all-reduce": 2.0, "send": self.size / max(1, self.size - 1), "receive": 0.0}
        return times.get(self.kind, 1.0) * self.bytes * (self.size - 1) / self.size


@contextmanager
def counted() -> Iterator[list[Collective]]:
    """The collectives that are called within, in their order; those of a single rank too."""
    with _Counter() as counter:
        yield counter.found


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.__name__.partition(".")[0].replace("_", "")
            kind = next((KINDS[k] for k in KINDS if name.startswith(k)), name)
            group = _group((*args, *(kwargs or {}).values()))
            if group is not None:
                largest = max(_bytes(value) for value in (*args, result))
                self.found.append(Collective(kind, largest, group.size(), group.group_desc))
        return result


def _group(args: Any) -> ProcessGroup | None:
    """The one among an operator's arguments; None where it needs none, as to wait for a result."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return ProcessGroup.unbox(value)
    names = [value for value in args if isinstance(value, str | ProcessGroup)]
    return _resolve_process_group(names[-1]) if names else None  # functional: the last one


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
