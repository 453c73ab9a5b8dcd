"""How long a step takes in a layout, by a simple model (docs/design.md, section "Planning").

Arithmetic at an attainable share of the peak, the traffic of weights, what of the bytes of
`communication` is not hidden behind arithmetic, and the bubble of the pipeline. It is there to rank
layouts; the share is the user's to correct (`--mfu`) once a run has measured its own.
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
"""Of a GPU's peak, what arithmetic reaches."""
MFU_SOURCE = "--mfu; the paper's three published runs on 8 and 16 A100s come to 28 to 32%"
"""Where that is known from: arXiv 2310.06694, as docs/design.md reckons it."""
LINK_SHARE = 0.7
"""Of a link's peak, what collectives reach."""
LATENCY = 20e-6
"""Seconds that a collective takes within a node however little is sent; and again for each time
that the number of nodes doubles."""
UPDATE_BYTES = 34
"""Read and written of a parameter by the optimizer: gradient (twice: its norm), copy, moments."""
FOLD_BYTES = {"bf16": 20, "fp32": 16}
"""Read and written of each weight of a rank that masks scale, along both its axes."""
CHAIN_RULE_BYTES = {"bf16": 50, "fp32": 60}
"""Of each of them that it owns: by the chain rule (44), and to have the weight itself again, which
with bf16 is the optimizer's fp32 copy (6) and else one put aside (8) and put back (8)."""
MASK_KERNELS = (480, 26)
"""Small kernels that a pruning step has and a dense one has not, as counted: and of each layer."""
KERNEL = 5e-6
"""Seconds of a small kernel in a queue."""


@dataclass(frozen=True)
class Cluster:
    """What a run stands on.

    Attributes:
        gpu: all of one kind.
        gpus_per_node: joined by its links; nodes are joined by the network.
        network: from a GPU to those of other nodes (bytes/s, one way).
        mfu: share of the peak that arithmetic reaches.
    """

    gpu: Gpu
    gpus_per_node: int = 8
    network: float = 25e9
    mfu: float = MFU

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Of a rank in a group of `ranks`, `stride` apart (bytes/s).

        A ring through several nodes uses the network of all its ranks of a node.
        """
        in_node = max(1, self.gpus_per_node // stride)
        link = self.gpu.link_bandwidth
        return LINK_SHARE * (link if ranks <= in_node else min(link, self.network * in_node))

    def seconds(self, transfer: Transfer) -> float:
        """Of what a rank sends, and waits for, in a step."""
        nodes = max(1.0, transfer.ranks * transfer.stride / self.gpus_per_node)
        latency = LATENCY * (1 + log2(nodes))
        bandwidth = self.bandwidth(transfer.ranks, transfer.stride)
        return transfer.count * latency + transfer.sent / bandwidth


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by what they go into; of communication what is not hidden."""

    arithmetic: float
    weights: float  # read for every micro-batch, gradients added up
    tensor: float
    context: float
    bubble: float  # of the pipeline
    pipeline: float  # messages
    data: float  # reducing gradients and gathering weights
    masks: float  # fold, chain rule, small kernels, and the sum of the masks' gradients
    update: float  # of the weights

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(vars(self).values()))


def step_time(setup: Setup, cluster: Cluster) -> StepTime:
    """The time of a step; the pipeline goes at the pace of its last stage, which has the head."""
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
    """Of communication in a step, on the last stage: what arithmetic does not hide, by KINDS.

    Beside the products of a third of the arithmetic Megatron-Core sends what they do not wait for;
    gradients are reduced beside the last micro-batch's backward pass, and weights gathered
    beside the first one's forward pass. Of interleaved messages half is taken to stay visible.
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
    """Share of a micro-batch's arithmetic beside which a collective of data parallelism runs."""
    if collective == ALL_GATHER:
        return 1 / 3 if setup.parallel.overlap_param_gather else 0.0
    return 2 / 3 if setup.parallel.overlap_grad_reduce else 0.0


def mask_bytes(setup: Setup) -> float:
    """Read and written of a rank's memory to fold the masks, and by the chain rule."""
    if not setup.masked:
        return 0.0
    held = _sizes(setup).scaled
    own = held / setup.owners
    folded = own if setup.parallel.overlap_param_gather else held
    return FOLD_BYTES[setup.precision] * folded + CHAIN_RULE_BYTES[setup.precision] * own


def mask_kernels(setup: Setup) -> int:
    """Small kernels of the masks: samples, penalty, their optimizer; blocks of weights."""
    always, of_layer = MASK_KERNELS
    return always + of_layer * setup.layers if setup.masked else 0


def _sizes(setup: Setup) -> Sizes:
    """Of the last stage."""
    stages = setup.parallel.pipeline
    return sizes_of_stage(setup.shape, setup.parallel.tensor, setup.layers, stages == 1, True)


def _arithmetic(setup: Setup, cluster: Cluster) -> float:
    """Seconds of a micro-batch on the last stage."""
    peak = cluster.gpu.bf16_flops * (1 if setup.element == 2 else 0.5)
    flops = stage_flops_per_token(setup) * setup.tokens / setup.parallel.tensor
    return flops / (peak * cluster.mfu)


def stage_flops_per_token(setup: Setup) -> float:
    """Arithmetic of the last stage for a token, forward and backward, with recomputation."""
    shape, recompute = setup.shape, setup.parallel.recompute
    head = 6.0 * shape.vocab_size * shape.hidden_size
    layers = flops_per_token(shape, setup.seq_length) - head
    if recompute == "full":
        layers *= 4 / 3
    elif recompute == "selective":
        heads = shape.num_layers * shape.num_attention_heads * shape.kv_channels
        layers += 4.0 * heads * setup.seq_length
    return layers / setup.parallel.pipeline + head
