"""How long a step takes in a layout, by a simple model (docs/design.md, section "Planning").

Arithmetic at an attainable share of the peak, the traffic of weights, what communication is not
hidden behind arithmetic, and the bubble of the pipeline. It is there to rank layouts; the share is
the user's to correct (`--mfu`) once a run has measured its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from megashear.hardware import Gpu
from megashear.planning.setup import Setup, sizes_of_stage
from megashear.pruning.counting import flops_per_token

MFU = 0.3
"""Of a GPU's peak, what arithmetic reaches."""
MFU_SOURCE = "--mfu; the paper's three published runs on 8 and 16 A100s come to 28 to 32%"
"""Where that is known from: arXiv 2310.06694, as docs/design.md reckons it."""
LINK_SHARE = 0.7
"""Of a link's peak, what collectives reach."""
UPDATE_BYTES = 34
"""Read and written of a parameter by the optimizer: gradient (twice, for its norm), copy, moments;
about the same of a masked one for folding, putting back and the chain rule."""


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


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by what they go into."""

    arithmetic: float
    weights: float  # read for every micro-batch, gradients added up
    tensor: float  # communication of tensor and context parallelism
    pipeline: float  # bubble and messages
    data: float  # what is not hidden of reducing gradients and gathering weights
    update: float  # of the weights, and folding of masks

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(vars(self).values()))


def step_time(setup: Setup, cluster: Cluster) -> StepTime:
    """The time of a step; the pipeline goes at the pace of its last stage, which has the head."""
    parallel, count = setup.parallel, setup.micro_batches
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    arithmetic, weights, tensor, message = _micro_batch(setup, cluster)
    each = arithmetic + weights + tensor + message
    data, update = _after(setup, cluster, arithmetic)
    return StepTime(
        arithmetic=count * arithmetic,
        weights=count * weights,
        tensor=count * tensor,
        pipeline=count * message + each * (stages - 1) / chunks,
        data=data,
        update=update,
    )


def _micro_batch(setup: Setup, cluster: Cluster) -> tuple[float, float, float, float]:
    """Seconds of a micro-batch on the last stage: arithmetic, weights, tensor, messages."""
    parallel, element, gpu = setup.parallel, setup.element, cluster.gpu
    flops = stage_flops_per_token(setup) * setup.tokens / parallel.tensor
    peak = gpu.bf16_flops * (1 if element == 2 else 0.5)
    # Read forward and, twice, backward; a gradient is written, read, and added to its fp32 sum.
    traffic = (5 * element + 8) * _parameters(setup)
    ends = (parallel.virtual_pipeline * 2 if parallel.pipeline > 1 else 0) * _hidden(setup)
    ends /= parallel.tensor if parallel.sequence else 1
    apart = parallel.tensor * parallel.context * setup.data_size
    if parallel.virtual_pipeline > 1:
        ends /= 2  # sent while others compute; half is taken to stay visible
    return (
        flops / (peak * cluster.mfu),
        traffic / gpu.memory_bandwidth,
        _layers_communication(setup, cluster),
        ends / cluster.bandwidth(2, apart),
    )


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


def _hidden(setup: Setup) -> float:
    """Bytes of the residual stream of a micro-batch."""
    return float(setup.element * setup.tokens * setup.shape.hidden_size)


def _layers_communication(setup: Setup, cluster: Cluster) -> float:
    """Seconds of tensor and context parallelism in all layers of a stage, none of it hidden."""
    parallel, shape = setup.parallel, setup.shape
    tensor, context = parallel.tensor, parallel.context
    seconds = 0.0
    if tensor > 1:
        # All-reduce, or gather and scatter: two forward, two backward, two more to recompute.
        times = 6 if parallel.recompute == "full" else 4
        volume = times * 2 * (tensor - 1) / tensor * _hidden(setup)
        seconds += volume / cluster.bandwidth(tensor, 1)
    if context > 1:
        # Keys and values forward, and backward with their gradients.
        keys = shape.num_query_groups * shape.kv_channels / tensor
        volume = 3 * 2 * keys * setup.element * setup.tokens * (context - 1)
        seconds += volume / cluster.bandwidth(context, tensor)
    return seconds * setup.layers


def _parameters(setup: Setup) -> int:
    stages = setup.parallel.pipeline
    return sizes_of_stage(
        setup.shape, setup.parallel.tensor, setup.layers, stages == 1, True
    ).parameters


def _after(setup: Setup, cluster: Cluster, arithmetic: float) -> tuple[float, float]:
    """Seconds of data parallelism that arithmetic of a micro-batch does not hide; of the update."""
    parallel, parameters = setup.parallel, _parameters(setup)
    ranks = setup.data_size * parallel.context
    moved = parameters * (ranks - 1) / ranks / cluster.bandwidth(ranks, parallel.tensor)
    if parallel.distributed_optimizer:
        reduce, gather = 4 * moved, setup.element * moved
    else:
        reduce, gather = 8 * moved, 0.0
    if parallel.overlap_grad_reduce:
        reduce = max(0.0, reduce - arithmetic * 2 / 3)
    if parallel.overlap_param_gather:
        gather = max(0.0, gather - arithmetic / 3)
    passes = parameters / setup.owners * (2 if setup.masked else 1)
    return reduce + gather, UPDATE_BYTES * passes / cluster.gpu.memory_bandwidth
