"""The layouts in which a run fits, fastest first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from megashear.config.schema import ModelShape, ParallelConfig, RunConfig
from megashear.config.shapes import allowed_layouts, shape_problems
from megashear.planning.communication import KINDS, transfers
from megashear.planning.memory import RESERVE, Memory, peak_memory
from megashear.planning.setup import Setup, setup_of
from megashear.planning.throughput import Cluster, StepTime, step_time

MICRO_BATCHES = (1, 2, 4, 8, 16)
CONTEXTS = (1, 2, 4, 8)
CHUNKS = (1, 2, 4, 8)
RECOMPUTE = ("none", "selective", "full")
OVERLAPPED = ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")


@dataclass(frozen=True)
class Layout:
    """A layout, the memory of its GPUs, and the time of its step."""

    setup: Setup
    memory: Memory
    time: StepTime

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all GPUs."""
        return self.setup.tokens_per_step / self.time.total

    @property
    def sent(self) -> dict[str, float]:
        """Bytes that a rank of the last pipeline stage sends in a step, by kind."""
        sent = dict.fromkeys(KINDS, 0.0)
        for transfer in transfers(self.setup, self.setup.parallel.pipeline - 1):
            sent[transfer.kind] += transfer.sent
        return sent

    @property
    def mask_overhead(self) -> float:
        """What masks add to the time of a step, as a fraction of a step without them."""
        return self.time.masks / (self.time.total - self.time.masks)

    @property
    def options(self) -> str:
        """Overrides on the command line that give a run this layout."""
        names = ("tensor", "sequence", "pipeline", "virtual_pipeline", "context", "recompute")
        parallel, default = self.setup.parallel, ParallelConfig()
        values = [
            f"parallel.{name}={str(getattr(parallel, name)).lower()}"
            for name in (*names, *OVERLAPPED)
            if getattr(parallel, name) != getattr(default, name)
        ]
        return " ".join([*values, f"trainer.micro_batch_size={self.setup.micro_batch_size}"])


def usable_bytes(cluster: Cluster, reserve: float = RESERVE) -> float:
    """Return the memory of a GPU that a plan may fill."""
    return cluster.gpu.memory_gib * 2**30 * (1 - reserve)


def layout_of(
    config: RunConfig, shape: ModelShape, gpus: int, cluster: Cluster, backend: str
) -> Layout:
    """Return the layout of a configuration that `config.validate` accepts."""
    setup = setup_of(config, shape, gpus, backend)
    return Layout(setup, peak_memory(setup), step_time(setup, cluster))


def allowed(
    config: RunConfig, shape: ModelShape, gpus: int, cluster: Cluster, backend: str
) -> Iterator[Layout]:
    """Return every layout that the rules of a run allow, whether it fits or not."""
    for candidate in _candidates(config, shape, gpus, cluster.gpus_per_node):
        yield layout_of(candidate, shape, gpus, cluster, backend)


def ranked(layouts: Iterable[Layout], usable: float) -> list[Layout]:
    """Return the fastest layout that fits of each way to split the model, fastest first.

    Ways differ by tensor, pipeline and context parallelism. Of layouts of one way that are equally
    fast (to 0.1%), the one that recomputes least is taken, then the one that takes least memory.
    """
    best: dict[tuple[int, int, int], Layout] = {}
    for layout in layouts:
        parallel = layout.setup.parallel
        way = (parallel.tensor, parallel.pipeline, parallel.context)
        if layout.memory.total <= usable and (way not in best or _is_better(layout, best[way])):
            best[way] = layout
    return sorted(best.values(), key=lambda layout: (layout.time.total, layout.memory.total))


def _is_better(one: Layout, other: Layout) -> bool:
    if not math.isclose(one.time.total, other.time.total, rel_tol=1e-3):
        return one.time.total < other.time.total
    recomputed = [RECOMPUTE.index(each.setup.parallel.recompute) for each in (one, other)]
    return (recomputed[0], one.memory.total) < (recomputed[1], other.memory.total)


def _candidates(
    config: RunConfig, shape: ModelShape, gpus: int, gpus_per_node: int
) -> Iterator[RunConfig]:
    """Return every configuration that the rules allow, with each way to recompute."""
    allowed = allowed_layouts(shape)
    tensors = [n for n in allowed["tensor"] if n <= gpus_per_node and gpus % n == 0]
    stages = [n for n in allowed["pipeline"] if gpus % n == 0]
    for tensor, pipeline, context in product(tensors, stages, CONTEXTS):
        if gpus % (tensor * pipeline * context):
            continue
        data = gpus // (tensor * pipeline * context)
        for chunks, micro in product(CHUNKS if pipeline > 1 else (1,), MICRO_BATCHES):
            parallel = replace(
                config.parallel,
                tensor=tensor,
                sequence=tensor > 1,
                pipeline=pipeline,
                virtual_pipeline=chunks,
                context=context,
                distributed_optimizer=data * context > 1,
                overlap_grad_reduce=data * context > 1,
                overlap_param_gather=data * context > 1,
            )
            trainer = replace(config.trainer, micro_batch_size=micro)
            changed = replace(config, parallel=parallel, trainer=trainer)
            if trainer.global_batch_size % (micro * data) == 0 and not shape_problems(
                changed, shape, gpus
            ):
                for recompute in RECOMPUTE:
                    yield replace(changed, parallel=replace(parallel, recompute=recompute))
