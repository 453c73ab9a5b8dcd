"""What ranks of real runs really allocate: every live storage is counted, by part."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megashear.config.schema import (
    DataConfig,
    EvaluationConfig,
    ModelShape,
    ParallelConfig,
    PlatformConfig,
    RunConfig,
    TargetShape,
    TrainerConfig,
)
from megashear.planning.memory import Memory, stage_memory
from megashear.planning.setup import CPU, setup_of
from megashear.platform import parallel
from megashear.training import trainer as trainer_module
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import run_config, write_domains

MHA = ModelShape(
    num_layers=4,
    hidden_size=256,
    num_attention_heads=8,
    ffn_hidden_size=704,
    vocab_size=2048,
)
GQA = replace(MHA, num_query_groups=4, vocab_size=512)
TIED = replace(MHA, tied_embeddings=True)
WIDE = replace(MHA, hidden_size=512, ffn_hidden_size=1376, vocab_size=8192)
TARGET = TargetShape(num_layers=2, hidden_size=128, num_attention_heads=4, ffn_hidden_size=352)


@dataclass(frozen=True)
class Case:
    """A run to measure."""

    ranks: int = 1
    shape: ModelShape = MHA
    precision: str = "fp32"
    prune: bool = False
    micro_batch_size: int = 2
    layout: dict[str, Any] = field(default_factory=dict)
    seq_length: int = 256
    global_batch_size: int = 8
    target: TargetShape = TARGET


OVERLAPPED = dict.fromkeys(
    ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"), True
)
SEQUENCE = {"tensor": 2, "sequence": True}
CASES = {
    "fp32": Case(),
    "bf16": Case(precision="bf16"),
    "bf16, prune": Case(precision="bf16", prune=True),
    "fp32, tied": Case(shape=TIED),
    "fp32, GQA, q/k norms": Case(shape=replace(GQA, qkv_bias=True, qk_norm=True)),
    "bf16, wide, vocabulary 8192": Case(shape=WIDE, precision="bf16", micro_batch_size=1),
    "fp32, tensor 2": Case(2, layout={"tensor": 2}),
    "bf16, tensor 2, sequence": Case(2, precision="bf16", layout=SEQUENCE),
    "fp32, tensor 2, sequence, prune": Case(2, prune=True, layout=SEQUENCE),
    "fp32, pipeline 2": Case(2, layout={"pipeline": 2}),
    "bf16, pipeline 2, tied": Case(2, TIED, "bf16", layout={"pipeline": 2}),
    "fp32, pipeline 2, interleaved": Case(2, layout={"pipeline": 2, "virtual_pipeline": 2}),
    "fp32, context 2": Case(2, layout={"context": 2}),
    "fp32, data 2, distributed": Case(2, layout={"distributed_optimizer": True}),
    "bf16, data 2, overlapped, prune": Case(2, MHA, "bf16", True, layout=OVERLAPPED),
    "fp32, recompute full": Case(layout={"recompute": "full"}),
    "bf16, GQA, recompute full": Case(1, GQA, "bf16", layout={"recompute": "full"}),
    "fp32, recompute selective": Case(layout={"recompute": "selective"}),
    "fp32, pipeline 2, recompute full": Case(2, layout={"pipeline": 2, "recompute": "full"}),
}
# Measured after the model was made, which none of them had a part in.
HELD_OUT = {
    "fp32, 6 layers of 320, tied, recompute selective, prune": Case(
        shape=ModelShape(6, 320, 10, 832, 1500, tied_embeddings=True),
        prune=True,
        micro_batch_size=4,
        layout={"recompute": "selective"},
    ),
    "bf16, 12 heads in 4 groups, tensor 2, pipeline 2, sequence": Case(
        4, ModelShape(4, 384, 12, 1024, 3000, 4), "bf16", layout={**SEQUENCE, "pipeline": 2}
    ),
    "bf16, 8 layers, interleaved, recompute full, data 2, prune": Case(
        4,
        ModelShape(8, 192, 6, 512, 6000, 2),
        "bf16",
        True,
        1,
        {"pipeline": 2, "virtual_pipeline": 2, "recompute": "full", **OVERLAPPED},
    ),
}


def measure(case: Case) -> list[tuple[dict[str, float], Memory]]:
    """(bytes measured, bytes expected) of each pipeline stage of a case."""
    with tempfile.TemporaryDirectory() as name:
        config = config_of(Path(name), case)
        measured = run_distributed(memory_of_run, case.ranks, config)
    setup = setup_of(config, case.shape, case.ranks, CPU)
    ranks = case.ranks // config.parallel.pipeline  # of a stage; the one that takes most counts
    stages = [measured[first : first + ranks] for first in range(0, case.ranks, ranks)]
    of_stages = [max(of_stage, key=lambda found: found["peak"]) for of_stage in stages]
    return [(found, stage_memory(setup, stage)) for stage, found in enumerate(of_stages)]


def config_of(directory: Path, case: Case) -> RunConfig:
    """A run on random tokens."""
    domains = write_domains(directory, case.shape.vocab_size)
    return run_config(
        directory,
        domains,
        stage="prune" if case.prune else "pretrain",
        model=case.shape,  # random weights, in stage prune too: nothing to write and read first
        target=case.target if case.prune else None,
        data=DataConfig(seq_length=case.seq_length, domains=domains),
        platform=PlatformConfig(device="cpu", precision=case.precision, timeout_minutes=2),
        trainer=TrainerConfig(
            steps=4,
            global_batch_size=case.global_batch_size,
            micro_batch_size=case.micro_batch_size,
        ),
        evaluation=EvaluationConfig(interval=4, sequences_per_domain=1),
        parallel=ParallelConfig(**case.layout),
    )


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and count what it made."""
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def memory_of_run(config: RunConfig) -> dict[str, float]:
    """Bytes of a rank by part, at the peak of its second step: the first makes states."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    with LiveMemory() as memory:
        trainer = Trainer(config, platform)
        trainer.train_step()
        found = _second_step(trainer, memory)
    parallel.stop()
    return found


def _second_step(trainer: Trainer, memory: LiveMemory) -> dict[str, float]:
    found = _held(trainer)
    phases: list[tuple[int, int]] = []  # (live before, peak)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            memory.peak = before = memory.live
            result = function(*args, **kwargs)
            phases.append((before, memory.peak))
            return result

        return call

    plain, held = trainer_module.run_micro_batches, sum(found.values())
    trainer_module.run_micro_batches = watched(plain)  # type: ignore[assignment]
    for part, method in ((trainer.optimizer, "step"), (trainer.objective, "backward")):
        setattr(part, method, watched(getattr(part, method)))
    try:
        trainer.train_step()
    finally:
        trainer_module.run_micro_batches = plain
    before, peak = phases[0]  # the micro-batches
    return found | {
        "masks": before - held if trainer.config.stage == "prune" else 0,
        "activations": peak - before,
        "peak": max(peak for _, peak in phases),
    }


def _held(trainer: Trainer) -> dict[str, float]:
    """Weights, their gradients, and the state of their optimizer with its copy of them."""
    parameters = [p for model in trainer.optimizer.models for p in model.parameters()]
    weights = _storages(parameters)
    megatron = trainer.optimizer.megatron
    state: list[Any] = []
    for optimizer in getattr(megatron, "chained_optimizers", [megatron]):
        torch_optimizer = optimizer.optimizer
        state += [value for of in torch_optimizer.state.values() for value in of.values()]
        state += [p for group in torch_optimizer.param_groups for p in group["params"]]
    apart = {key: size for key, size in _storages(state).items() if key not in weights}
    gradients = _storages(p.main_grad for p in parameters)
    parts = {"weights": weights, "gradients": gradients, "optimizer": apart}
    return {name: float(sum(sizes.values())) for name, sizes in parts.items()}


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of the storages behind tensors, each once."""
    found = (value.untyped_storage() for value in tensors if isinstance(value, Tensor))
    return {storage._cdata: storage.nbytes() for storage in found}
