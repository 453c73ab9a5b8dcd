"""A simple model of the time of a step in a layout (docs/planning.md).

It adds arithmetic at an attainable fraction of the peak, reads and writes of weights, communication
that is not hidden behind arithmetic, and the bubble of the pipeline. It serves to rank layouts;
users correct the fraction (`--mfu`) when a run has measured its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from megashear.hardware import Gpu
from megashear.planning.communication import (
    ALL_GATHER,
    CONTEXT,
    DATA,
    KINDS,
    MASK_GRADIENTS,
    PIPELINE,
    TENSOR,
    Transfer,
    transfers,
)
from megashear.planning.setup import Setup, Sizes, sizes_of_stage
from megashear.pruning.counting import flops_per_token

MFU = 0.3
"""Fraction of a GPU's peak that arithmetic reaches."""
MFU_SOURCE = "--mfu; the paper's three published runs on 8 and 16 A100s come to 28 to 32%"
"""The source of MFU: arXiv 2310.06694, by the computation in docs/planning.md."""
LINK_SHARE = 0.7
"""Fraction of a link's peak that collectives reach."""
LATENCY = 20e-6
"""Least seconds of a collective within a node; each doubling of the nodes adds as much."""
UPDATE_BYTES = 34
"""Bytes per parameter that the optimizer reads and writes: gradient (twice), copy, moments."""
FOLD_BYTES = {"bf16": 20, "fp32": 16}
"""Bytes read and written per masked weight of a rank to scale it along both axes."""
CHAIN_RULE_BYTES = {"bf16": 50, "fp32": 60}
"""Bytes per masked weight that a rank owns: for the chain rule (44), and to restore the weight; in
bf16 from the optimizer's fp32 copy (6), else from a copy that is made (8) and read (8)."""
MASK_KERNELS = (480, 26)
"""Small kernels that a pruning step has in addition to a dense one: always, and per layer."""
KERNEL = 5e-6
"""Seconds of a small kernel in a filled queue."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a run.

    Attributes:
        gpu: the kind of all GPUs.
        gpus_per_node: GPUs joined by the GPU's links; the network joins nodes.
        network: bandwidth from a GPU to other nodes (bytes/s, one way).
        mfu: fraction of the peak that arithmetic reaches.
    """

    gpu: Gpu
    gpus_per_node: int = 8
    network: float = 25e9
    mfu: float = MFU

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Return the bandwidth of a rank in a group of `ranks`, `stride` apart (bytes/s).

        A ring through several nodes uses the network of all its ranks in a node.
        """
        in_node = max(1, self.gpus_per_node // stride)
        link = self.gpu.link_bandwidth
        return LINK_SHARE * (link if ranks <= in_node else min(link, self.network * in_node))

    def seconds(self, transfer: Transfer) -> float:
        """Return the seconds of a transfer in a step."""
        nodes = max(1.0, transfer.ranks * transfer.stride / self.gpus_per_node)
        latency = LATENCY * (1 + log2(nodes))
        bandwidth = self.bandwidth(transfer.ranks, transfer.stride)
        return transfer.count * latency + transfer.sent / bandwidth


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by purpose; communication counts where it is not hidden."""

    arithmetic: float
    weights: float  # reads for every micro-batch, sums of gradients
    tensor: float
    context: float
    bubble: float  # of the pipeline
    pipeline: float  # messages
    data: float  # reducing gradients and gathering weights
    masks: float  # fold, chain rule, small kernels, and the sum of the masks' gradients
    update: float  # of the weights

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return float(sum(vars(self).values()))


def step_time(setup: Setup, cluster: Cluster) -> StepTime:
    """Return the time of a step; the last stage, which has the output head, sets the pace."""
    parallel, count, gpu = setup.parallel, setup.micro_batches, cluster.gpu
    sizes, memory = _sizes(setup), gpu.memory_bandwidth
    arithmetic = count * _arithmetic(setup, cluster)
    # Read forward and, twice, backward; a gradient is written, read, and added to its fp32 sum.
    weights = count * (5 * setup.element + 8) * sizes.parameters / memory
    exposed = exposed_seconds(setup, cluster)
    busy = arithmetic + weights + exposed[TENSOR] + exposed[CONTEXT] + exposed[PIPELINE]
    return StepTime(
        arithmetic=arithmetic,
        weights=weights,
        tensor=exposed[TENSOR],
        context=exposed[CONTEXT],
        bubble=busy / count * (parallel.pipeline - 1) / parallel.virtual_pipeline,
        pipeline=exposed[PIPELINE],
        data=exposed[DATA],
        masks=exposed[MASK_GRADIENTS] + mask_bytes(setup) / memory + mask_kernels(setup) * KERNEL,
        update=UPDATE_BYTES * sizes.parameters / setup.owners / memory,
    )


def exposed_seconds(setup: Setup, cluster: Cluster) -> dict[str, float]:
    """Return the communication of the last stage that arithmetic does not hide, by KINDS.

    Megatron-Core overlaps tensor-parallel communication with a third of the arithmetic. Gradients
    are reduced during the backward pass of the last micro-batch, and weights are gathered during
    the forward pass of the first. Half of interleaved messages is assumed to stay visible.
    """
    parallel, arithmetic = setup.parallel, _arithmetic(setup, cluster)
    seconds, beside = dict.fromkeys(KINDS, 0.0), 0.0
    for transfer in transfers(setup, parallel.pipeline - 1):
        time = cluster.seconds(transfer)
        if transfer.beside_products:
            beside += time
            continue
        if transfer.kind == DATA:
            time = max(0.0, time - _hides(setup, transfer.collective) * arithmetic)
        seconds[transfer.kind] += time
    seconds[TENSOR] += max(0.0, beside - setup.micro_batches * arithmetic / 3)
    if parallel.virtual_pipeline > 1:
        seconds[PIPELINE] /= 2
    return seconds


def _hides(setup: Setup, collective: str) -> float:
    """Fraction of a micro-batch's arithmetic that a data-parallel collective overlaps with."""
    if collective == ALL_GATHER:
        return 1 / 3 if setup.parallel.overlap_param_gather else 0.0
    return 2 / 3 if setup.parallel.overlap_grad_reduce else 0.0


def mask_bytes(setup: Setup) -> float:
    """Bytes that a rank reads and writes to apply the masks and for the chain rule."""
    if not setup.masked:
        return 0.0
    held = _sizes(setup).scaled
    own = held / setup.owners
    folded = own if setup.parallel.overlap_param_gather else held
    return FOLD_BYTES[setup.precision] * folded + CHAIN_RULE_BYTES[setup.precision] * own


def mask_kernels(setup: Setup) -> int:
    """Small kernels of the masks: sampling, penalty, their optimizer, blocks of weights."""
    always, of_layer = MASK_KERNELS
    return always + of_layer * setup.layers if setup.masked else 0


def _sizes(setup: Setup) -> Sizes:
    """Parameters of the last stage."""
    stages = setup.parallel.pipeline
    return sizes_of_stage(setup.shape, setup.parallel.tensor, setup.layers, stages == 1, True)


def _arithmetic(setup: Setup, cluster: Cluster) -> float:
    """Seconds of a micro-batch on the last stage."""
    peak = cluster.gpu.bf16_flops * (1 if setup.element == 2 else 0.5)
    flops = stage_flops_per_token(setup) * setup.tokens / setup.parallel.tensor
    return flops / (peak * cluster.mfu)


def stage_flops_per_token(setup: Setup) -> float:
    """FLOPs of the last stage per token, forward and backward, with recomputation."""
    shape, recompute = setup.shape, setup.parallel.recompute
    head = 6.0 * shape.vocab_size * shape.hidden_size
    layers = flops_per_token(shape, setup.seq_length) - head
    if recompute == "full":
        layers *= 4 / 3
    elif recompute == "selective":
        heads = shape.num_layers * shape.num_attention_heads * shape.kv_channels
        layers += 4.0 * heads * setup.seq_length
    return layers / setup.parallel.pipeline + head
