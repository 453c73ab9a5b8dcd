"""Seed the random generators of a process, and get and set their states as plain data."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor


def seed_all(seed: int, rank: int) -> None:
    """Seed every generator by (seed, rank), after Megatron-Core's groups are built.

    Python's and numpy's differ between ranks; torch's differ where Megatron-Core needs it. On a CPU
    tensor-parallel ranks draw the same initial weights and cut their shards out of them.
    """
    from megatron.core import tensor_parallel

    random.seed(f"{seed}:{rank}")
    numpy.random.seed([seed % 2**32, rank])
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def random_states(device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the states of torch's generators as tensors, and Python's and numpy's as JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    tensors |= {f"tracker.{name}": state for name, state in _tracker().get_states().items()}
    kind, keys, *rest = numpy.random.get_state()
    plain = {"python": random.getstate(), "numpy": [kind, numpy.asarray(keys).tolist(), *rest]}
    return tensors, {name: json.dumps(state) for name, state in plain.items()}


def restore_random_states(
    tensors: Mapping[str, Tensor], plain: Mapping[str, str], device: torch.device
) -> None:
    """Set the generators to states that `random_states` returned."""
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)
    prefix = "tracker."
    names = [name for name in tensors if name.startswith(prefix)]
    _tracker().set_states({name.removeprefix(prefix): tensors[name] for name in names})
    version, keys, gauss = json.loads(plain["python"])
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = json.loads(plain["numpy"])
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))


def _tracker() -> Any:
    from megatron.core import tensor_parallel

    return tensor_parallel.get_cuda_rng_tracker()
