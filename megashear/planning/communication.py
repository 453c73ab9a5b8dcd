"""The bytes that a rank sends in a step, collective by collective (docs/planning.md).

The counts are exact on CPU processes (torch layers, Megatron-Core's schedules, data parallelism),
except for sums of a few numbers and the padding of buckets under the distributed optimizer:
`benchmarks/scaling.py` and tests/planning/test_communication.py measure them. The ring in which
Transformer Engine passes keys and values over context ranks is modelled from its code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megashear.planning.setup import TRANSFORMER_ENGINE, Setup, Sizes, sizes_of_stage

TENSOR, CONTEXT, PIPELINE, DATA, MASK_GRADIENTS = KINDS = (
    "tensor",
    "context",
    "pipeline",
    "data",
    "masks",
)
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, SEND = COLLECTIVES = (
    *("all-reduce", "all-gather"),
    *("reduce-scatter", "send"),
)


@dataclass(frozen=True)
class Transfer:
    """Equal collectives, or messages, that a rank takes part in.

    Attributes:
        kind: one of KINDS: which parallelism needs it.
        collective: one of COLLECTIVES.
        bytes: size of the whole tensor of one call.
        count: calls in a step.
        ranks: size of the group.
        stride: distance from one rank of the group to the next.
        beside_products: begun beside a matrix product that does not wait for it.
    """

    kind: str
    collective: str
    bytes: float
    count: float
    ranks: int
    stride: int
    beside_products: bool = False

    @property
    def sent(self) -> float:
        """Bytes that the rank sends in a step, in a ring."""
        if self.collective == SEND:
            return self.count * self.bytes
        times = 2 if self.collective == ALL_REDUCE else 1
        return times * self.count * self.bytes * (self.ranks - 1) / self.ranks


def transfers(setup: Setup, stage: int) -> list[Transfer]:
    """Return what a rank of a pipeline stage (counted from 0) sends in a step."""
    every = (
        *_tensor(setup, stage),
        *_context(setup),
        *_pipeline(setup, stage),
        *_data(setup, stage),
        *_masks(setup),
    )
    return [each for each in every if each.ranks > 1 and each.count]


def _hidden(setup: Setup) -> float:
    """Bytes of the residual stream of a micro-batch, before it is split."""
    return float(setup.element * setup.tokens * setup.shape.hidden_size)


def _ends(setup: Setup, stage: int) -> tuple[bool, bool]:
    """Whether a stage has the embedding, and whether it has the output head."""
    return stage == 0, stage == setup.parallel.pipeline - 1


def _sizes(setup: Setup, stage: int) -> Sizes:
    return sizes_of_stage(setup.shape, setup.parallel.tensor, setup.layers, *_ends(setup, stage))


def _tensor(setup: Setup, stage: int) -> Iterator[Transfer]:
    """Sums of the outputs of row-parallel weights and of the gradients of column-parallel ones.

    A layer has two of each; the embedding and the output head have one. Under `sequence` a sum is a
    reduce-scatter, and each linear layer gathers its input: column-parallel ones in the forward
    pass and again for the gradient of their weight, row-parallel ones the gradient of their output.
    """
    parallel, count = setup.parallel, setup.micro_batches
    first, last = _ends(setup, stage)
    again = 2 * setup.layers * (parallel.recompute == "full")
    forward, backward = 2 * setup.layers + again + first, 2 * setup.layers + last

    def calls(collective: str, size: float, number: float, beside: bool = False) -> Transfer:
        return Transfer(TENSOR, collective, size, number, parallel.tensor, 1, beside)

    hidden = _hidden(setup)
    if parallel.sequence:
        gathered = 2 * setup.layers + again + last  # forward
        gathered += 2 * setup.layers + first  # gradients of what was scattered
        yield calls(REDUCE_SCATTER, hidden, count * forward)
        yield calls(ALL_GATHER, hidden, count * gathered)
        yield calls(ALL_GATHER, hidden, count * backward, True)
        yield calls(REDUCE_SCATTER, hidden, count * backward, True)
    else:
        yield calls(ALL_REDUCE, hidden, count * forward)
        yield calls(ALL_REDUCE, hidden, count * backward, True)
    if last:  # of the loss: largest logit, that of the label, sum of exponentials
        yield calls(ALL_REDUCE, 4 * setup.tokens, 3 * count)
    sizes = _sizes(setup, stage)
    partial = sizes.replicated if parallel.sequence else sizes.qk_norms
    yield calls(ALL_REDUCE, 4 * partial, 1 if partial else 0)


def _context(setup: Setup) -> Iterator[Transfer]:
    """Keys and values of all context ranks, and their gradients (in a ring both)."""
    parallel, shape = setup.parallel, setup.shape
    again = parallel.recompute != "none"  # both ways to recompute repeat attention
    calls = 2 * setup.layers * setup.micro_batches
    channels = shape.num_query_groups * shape.kv_channels / parallel.tensor
    local = setup.element * setup.tokens * channels
    group = (parallel.context, parallel.tensor)
    if setup.backend == TRANSFORMER_ENGINE:
        rounds = (3 + again) * (parallel.context - 1)
        yield Transfer(CONTEXT, SEND, local, rounds * calls, *group)
    else:
        whole = local * parallel.context
        yield Transfer(CONTEXT, ALL_GATHER, whole, (1 + again) * calls, *group)
        yield Transfer(CONTEXT, REDUCE_SCATTER, whole, calls, *group)


def _pipeline(setup: Setup, stage: int) -> Iterator[Transfer]:
    """Activations to the next stage, gradients to the one before; a tied embedding's gradient."""
    parallel, shape = setup.parallel, setup.shape
    first, last = _ends(setup, stage)
    apart = parallel.tensor * parallel.context * setup.data_size
    message = _hidden(setup) / (parallel.tensor if parallel.sequence else 1)
    calls = setup.micro_batches * (2 * parallel.virtual_pipeline - first - last)
    yield Transfer(PIPELINE, SEND, message, calls, 2, apart)
    if shape.tied_embeddings and first != last:
        number = -(-shape.vocab_size // parallel.tensor) * shape.hidden_size
        yield Transfer(PIPELINE, ALL_REDUCE, 4 * number, 1, 2, apart * (parallel.pipeline - 1))


def _data(setup: Setup, stage: int) -> Iterator[Transfer]:
    """Sums of gradients in fp32; under the distributed optimizer, the gathering of weights."""
    parallel = setup.parallel
    number = _sizes(setup, stage).parameters
    group = (setup.data_size * parallel.context, parallel.tensor)
    if parallel.distributed_optimizer:
        yield Transfer(DATA, REDUCE_SCATTER, 4 * number, 1, *group)
        yield Transfer(DATA, ALL_GATHER, setup.element * number, 1, *group)
    else:
        yield Transfer(DATA, ALL_REDUCE, 4 * number, 1, *group)


def _masks(setup: Setup) -> Iterator[Transfer]:
    """One sum of the gradients of all masks over the ranks that hold shards of the model.

    Under the distributed optimizer these are all ranks.
    """
    parallel = setup.parallel
    ranks = parallel.tensor * parallel.pipeline
    if parallel.distributed_optimizer:
        ranks *= parallel.context * setup.data_size
    yield Transfer(
        MASK_GRADIENTS, ALL_REDUCE, 4 * setup.masked_units, 1 if setup.masked else 0, ranks, 1
    )
