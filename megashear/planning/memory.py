"""The memory of a rank, computed part by part (docs/planning.md).

Activations follow Korthikanti et al. 2022 (arXiv 2205.05198), for the tensors that these layers
keep for the backward pass: no attention scores (flash kernels), no dropout. The model is compared
with what runs allocate on CPUs by `benchmarks/memory_model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from megashear.hardware import BLOCK_ELEMENTS
from megashear.planning.setup import CPU, TRANSFORMER_ENGINE, Setup, sizes_of_stage

ERROR = 0.06
"""Largest relative error of a rank's peak against measured peaks on CPUs (benchmarks/results)."""
ERROR_TEXT = f"within {ERROR:.0%} of measured peaks on CPUs; not measured on GPUs"

RESERVE = 0.1
"""Fraction of a GPU's memory kept free for what is not modelled: CUDA's context, NCCL's buffers,
workspaces of matrix products, fragmentation."""

MASK_BYTES = 48
"""Bytes per unit of the masks: log_alpha, its gradient, two moments, and what sampling keeps."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its peak."""

    weights: float
    gradients: float
    optimizer: float
    masks: float  # masks, scales, and the copy of scaled weights
    activations: float  # of all micro-batches in flight, and the gradients of a layer
    logits: float  # and what the loss and the gradient of the output head take
    buffers: float  # of communication, and temporary copies of the optimizer

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return float(sum(vars(self).values()))


def peak_memory(setup: Setup) -> Memory:
    """Return the memory of the rank that needs most: in the first or the last pipeline stage."""
    stages = {0, setup.parallel.pipeline - 1}
    return max((stage_memory(setup, stage) for stage in sorted(stages)), key=lambda m: m.total)


def stage_memory(setup: Setup, stage: int) -> Memory:
    """Return the memory of a rank of a pipeline stage, counted from 0."""
    parallel, element, owners = setup.parallel, setup.element, setup.owners
    first, last = stage == 0, stage == parallel.pipeline - 1
    sizes = sizes_of_stage(setup.shape, parallel.tensor, setup.layers, first, last)
    fp32_copy = 4 if setup.precision == "bf16" else 0  # in addition to two moments
    # Scaled weights are copied unless the optimizer has a copy of its own.
    put_aside = 0 if setup.precision == "bf16" else 4 * sizes.scaled / owners
    device = "cpu" if setup.backend == CPU else "cuda"
    scratch = 4 * min(BLOCK_ELEMENTS[device], sizes.most_scaled / owners)  # of the chain rule
    kept, at_work, logits = _activations(setup, stage)
    inside = kept + at_work + logits
    after = _after_backward(setup, sizes.parameters, sizes.largest)
    return Memory(
        weights=element * sizes.parameters,
        gradients=4 * sizes.parameters,
        optimizer=(8 + fp32_copy) * sizes.parameters / owners,
        masks=(put_aside + scratch + MASK_BYTES * setup.masked_units) if setup.masked else 0,
        activations=kept + at_work,
        logits=logits,
        # In addition to activations, or after the backward pass in their place, if that is more.
        buffers=_communication(setup, stage) + max(0.0, after - inside),
    )


def _after_backward(setup: Setup, parameters: int, largest: int) -> float:
    """Bytes of temporary copies in the optimizer's step."""
    if setup.backend == TRANSFORMER_ENGINE:  # its fused Adam has none
        return 0.0
    if setup.backend == CPU:  # one parameter after another
        return 2.3 * 4 * largest
    return 4 * parameters / setup.owners  # all at once


def _communication(setup: Setup, stage: int) -> float:
    """Bytes of the buffers for pipeline messages and for what sequence parallelism gathers."""
    hidden = setup.element * setup.tokens * setup.shape.hidden_size
    messages = 2 * ((stage > 0) + (setup.parallel.virtual_pipeline > 1))
    return messages * hidden / _split(setup) + (hidden if setup.parallel.sequence else 0)


def _split(setup: Setup) -> int:
    """Ranks over which norms and the residual stream are split."""
    return setup.parallel.tensor if setup.parallel.sequence else 1


def _activations(setup: Setup, stage: int) -> tuple[float, float, float]:
    """Bytes (kept for the backward pass, at work in a layer, of logits and loss) at the peak."""
    parallel, tokens, element = setup.parallel, setup.tokens, setup.element
    hidden = element * tokens * setup.shape.hidden_size / _split(setup)
    per_layer = layer_activations(setup)
    full = parallel.recompute == "full"
    chunk_layers = setup.layers / parallel.virtual_pipeline
    in_flight = _in_flight(setup, stage)
    kept = in_flight * chunk_layers * (hidden if full else per_layer)
    if setup.backend == CPU:  # outputs are not freed when sent
        last = stage == parallel.pipeline - 1
        kept += in_flight * hidden * (1 - 1 / parallel.virtual_pipeline if last else 1)
    # Backward through a gated MLP: gradients of its output and of both its halves.
    at_work = hidden + 2 * element * tokens * setup.shape.ffn_hidden_size / parallel.tensor
    if full:  # a layer exists a second time, with its output
        x_kept = hidden if setup.precision == "fp32" or setup.backend != CPU else 0
        at_work += per_layer - x_kept + hidden
    if parallel.sequence:  # gathered inputs of all tokens
        at_work += element * tokens * setup.shape.hidden_size
    embedding = element * _vocabulary(setup) * setup.shape.hidden_size
    if stage == 0:  # its gradient, at the end of a micro-batch
        at_work = max(at_work, embedding + 2 * hidden - kept / in_flight)
    if setup.shape.tied_embeddings and parallel.pipeline == 1:  # that of the output head waits
        at_work += embedding
    if stage < parallel.pipeline - 1:
        return kept, at_work, 0.0
    loss = _loss(setup, hidden)
    return (kept, at_work, 0.0) if at_work > loss else (kept, 0.0, loss)


def layer_activations(setup: Setup) -> float:
    """Bytes that a layer keeps of a micro-batch without recomputing all of it."""
    shape, parallel, element, tokens = setup.shape, setup.parallel, setup.element, setup.tokens
    tensor, context = parallel.tensor, parallel.context
    queries = shape.num_attention_heads * shape.kv_channels / tensor
    keys = shape.num_query_groups * shape.kv_channels / tensor
    norms = 2 * _norm(setup) * shape.hidden_size / _split(setup)
    # The projection as a whole, whose values attention keeps; rotated queries and keys; output.
    attention = element * ((queries + 2 * keys) + (queries + keys) + queries)
    if context > 1 and setup.backend != TRANSFORMER_ENGINE:
        # Instead: gathered keys and values of all ranks; outputs of both blocks, and joined.
        attention = element * (3 * queries + 2 * keys * context)
    if shape.qk_norm:
        attention += (_norm(setup) - element) * (queries + keys)
    if parallel.recompute != "selective":
        attention += 4 * shape.num_attention_heads / tensor  # log-sum-exp
    if setup.backend != TRANSFORMER_ENGINE:
        # Cosines and sines for queries and keys, once for all sequences of the batch.
        attention += element * 4 * shape.kv_channels / setup.micro_batch_size
    if setup.backend not in (CPU, TRANSFORMER_ENGINE) and setup.micro_batch_size > 1:
        attention += element * queries  # the output, in another order
    # fc1 (gate and up) and the product; uncompiled also the activated gate and the up half.
    halves = 5 if setup.backend == CPU else 3
    mlp = element * halves * shape.ffn_hidden_size / tensor
    return tokens * (norms + attention + mlp)


def _norm(setup: Setup) -> int:
    """Bytes per element of a norm's input and output; on a CPU also of its intermediate results."""
    if setup.backend != CPU:
        return 2 * setup.element
    return 3 * 4 if setup.precision == "fp32" else 4 + 4 + 2


def _vocabulary(setup: Setup) -> int:
    """Rows of the vocabulary on a tensor-parallel rank, with padding."""
    return -(-setup.shape.vocab_size // setup.parallel.tensor)


def _loss(setup: Setup, hidden: float) -> float:
    """Bytes at the end of the model, at the larger of two moments.

    In the loss: logits, and their fp32 copy if they are bf16. In the backward pass of the output
    head: the gradients of the logits, of its weight and of its input.
    """
    shape, tokens, element = setup.shape, setup.tokens, setup.element
    vocabulary = _vocabulary(setup)
    norm = tokens * _norm(setup) * shape.hidden_size / _split(setup)
    bf16 = element == 2
    in_loss = tokens * vocabulary * (6 if bf16 else 4) + (hidden if bf16 else 0)
    in_backward = element * vocabulary * (tokens + shape.hidden_size) + hidden
    if setup.parallel.sequence:  # input and its gradient, of all tokens
        in_backward += 2 * element * tokens * shape.hidden_size
    return norm + max(in_loss, in_backward)


def _in_flight(setup: Setup, stage: int) -> int:
    """Chunks of layers whose activations a stage keeps at once (1F1B, or interleaved)."""
    stages, chunks = setup.parallel.pipeline, setup.parallel.virtual_pipeline
    all_chunks = setup.micro_batches * chunks
    if chunks == 1:
        return min(all_chunks, stages - stage)
    return min(all_chunks, 2 * (stages - stage - 1) + (chunks - 1) * stages + 1)
