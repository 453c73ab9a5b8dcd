"""What a step does, counted: operators, waits of the host for a device, bytes kept for backward.

None of it depends on the machine, so CPU processes say what the host does with a GPU. Collectives
are counted by tests/support/collectives.py, live memory by tests/planning/measured.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megashear.platform.cuda import ToHost
from megashear.training.trainer import Trainer

WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero")
"""Operators whose result the host needs before it goes on; item(), float() and `if` end in one."""
TO_HOST = (Tensor.cpu, Tensor.numpy, Tensor.tolist)


class Operators(TorchDispatchMode):
    """Calls of operators by name, those of the backward pass too; views among them.

    Attributes:
        calls: of each.
        listed: tensors in the lists of multi-tensor calls, for each of which a GPU may start a
            kernel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.listed = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count it, and run it."""
        self.calls[function.__name__] += 1
        if function.__name__.startswith("_foreach"):
            self.listed += len(args[0])
        return function(*args, **(kwargs or {}))


class _Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._on_host: dict[int, Any] = {}  # storages that would not be on the device, kept alive

    def came_to_host(self, tensors: Iterable[Tensor]) -> None:
        storages = (tensor.untyped_storage() for tensor in tensors)
        self._on_host |= {storage._cdata: storage for storage in storages}

    def on_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._on_host

    def count(self, name: str, tensor: Tensor) -> None:
        self.calls[name] += not self.on_host(tensor)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__.partition(".")[0]
        if name in WAITING:
            self.count(name, args[0])
        result = function(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if given and all(map(self.on_host, given)):
            self.came_to_host(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


class _Transfers(TorchFunctionMode):
    """What only Python sees: a copy to the host, which is none on a CPU, is made one here."""

    def __init__(self, waits: _Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in TO_HOST:
            self.waits.count(function.__name__, args[0])
        if function is Tensor.cpu:
            result = result.clone()
            self.waits.came_to_host([result])
        return result


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Times that the host would wait for a device, by what it asks for.

    What was brought to the host before, or is computed from that alone, is there; and so are the
    step counts of optimizers.
    """
    waits, read = _Waits(), ToHost.read

    def read_once(to_host: ToHost) -> dict[str, Tensor]:
        waits.calls["ToHost.read"] += 1
        found = read(to_host)
        waits.came_to_host(found.values())
        return found

    def known(optimizer: Optimizer, *_: Any) -> None:
        states = optimizer.state.values()
        waits.came_to_host(state["step"] for state in states if "step" in state)

    hook = register_optimizer_step_pre_hook(known)
    ToHost.read = read_once  # type: ignore[method-assign]
    try:
        with waits, _Transfers(waits):
            yield waits.calls
    finally:
        ToHost.read = read  # type: ignore[method-assign]
        hook.remove()


def saved_bytes(trainer: Trainer) -> int:
    """Bytes of the distinct storages that autograd keeps of a step's first micro-batch.

    Those of the parameters, which are there anyway, do not count.
    """
    model = trainer.optimizer.models[0]
    held = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Any] = {}  # kept alive, so that no two have one address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            saved[storage._cdata] = storage
        return tensor

    context = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    def leave(*_: Any) -> None:
        context.__exit__()
        for hook in hooks:
            hook.remove()

    hooks = [
        model.register_forward_pre_hook(lambda *_: context.__enter__()),
        model.register_forward_hook(leave),
    ]
    trainer.train_step()
    return sum(storage.nbytes() for storage in saved.values())
