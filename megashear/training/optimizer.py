"""Build Megatron-Core's data parallelism, optimizer and schedule for a run."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megashear.config.schema import OptimizerConfig, ParallelConfig


class WeightOptimizer:
    """AdamW on the weights, clipped by their global norm, with warm-up and cosine decay.

    Args:
        chunks: this rank's shard of the model, one chunk for each virtual pipeline stage.
        config: options of AdamW and of the schedule.
        parallel: says whether the optimizer's state is distributed, and what overlaps.
        steps: length of the run.

    Attributes:
        chunks: the given chunks, which checkpoints hold.
        models: the chunks in Megatron-Core's DistributedDataParallel, with gradients in
            `main_grad`.
        megatron: Megatron-Core's optimizer.
    """

    def __init__(
        self, chunks: list[Any], config: OptimizerConfig, parallel: ParallelConfig, steps: int
    ) -> None:
        self.config, self.parallel, self.chunks = config, parallel, chunks
        model_config = chunks[0].config
        buckets = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            align_param_gather=parallel.overlap_param_gather,
        )
        # Only the gradients of the first chunk are reduced in several buckets, as in Megatron-LM:
        # those of the others are ready long before the backward pass ends.
        self.models = [
            DistributedDataParallel(model_config, buckets, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        for model in self.models:
            model.broadcast_params()
        bf16 = model_config.bf16
        self.megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.lr * config.min_lr_ratio,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
                use_distributed_optimizer=parallel.distributed_optimizer,
                overlap_param_gather=parallel.overlap_param_gather,
            ),
            self.models,
            use_gloo_process_groups=False,
        )
        self._schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.lr * config.min_lr_ratio,
            lr_warmup_steps=min(config.warmup_steps, steps - 1),
            lr_decay_steps=steps,
            lr_decay_style="cosine",
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=steps,
            wd_incr_style="constant",
        )
        model_config.finalize_model_grads_func = finalize_model_grads
        model_config.grad_scale_func = self.megatron.scale_loss
        if parallel.overlap_grad_reduce:  # reduce with the last micro-batch only
            no_sync = [model.no_sync for model in self.models]
            model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def zero_grad(self) -> None:
        """Clear the gradients of the last step."""
        for model in self.models:
            model.zero_grad_buffer()
        self.megatron.zero_grad()

    def owned(self, parameter: torch.nn.Parameter) -> range:
        """Return the range of a flattened parameter whose reduced gradient and state this rank has.

        Without a distributed optimizer that is all of it. A distributed optimizer splits its
        buckets evenly over the data-parallel ranks, wherever a parameter begins.
        """
        size = parameter.numel()
        if not self.parallel.distributed_optimizer:
            return range(size)
        groups = (model.param_to_bucket_group.get(parameter) for model in self.models)
        group = next(group for group in groups if group is not None)
        bucket = next(bucket for bucket in group.buckets if parameter in bucket.params)
        gradient: Any = parameter.main_grad  # type: ignore[attr-defined]
        begin = gradient.storage_offset() - bucket.grad_data.storage_offset()
        shard = bucket.grad_data.numel() // group.intra_distributed_optimizer_instance_size
        first = group.intra_distributed_optimizer_instance_rank * shard - begin
        return range(min(max(first, 0), size), min(max(first + shard, 0), size))

    def master(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Return the optimizer's fp32 copy of a bf16 parameter, flattened, in the `owned` range.

        None in fp32, where the parameter is its own master.
        """
        main = getattr(parameter, "main_param", None)  # Megatron-Core's name
        return None if main is None else main.detach().view(-1)

    def collect(self) -> None:
        """All-gather weights that only the ranks that own them have restored.

        With `overlap_param_gather`, `gather` does that before each use.
        """
        if self.parallel.distributed_optimizer and not self.parallel.overlap_param_gather:
            for model in self.models:
                model.start_param_sync()

    def gather(self, *, wait: bool = False) -> None:
        """With `overlap_param_gather`, start to all-gather the weights from their owners.

        Modules wait for their weights before their forward pass. Without it this does nothing: a
        step has gathered them.

        Args:
            wait: wait until all weights have arrived.
        """
        if self.parallel.overlap_param_gather:
            for model in self.models:
                model.start_param_sync(force_sync=wait)

    def begin_step(self, step: int) -> float:
        """Set the learning rate of the step after `step` completed ones.

        Returns:
            The learning rate as a fraction of `config.lr`. It depends on the step alone, so there
            is nothing to resume.
        """
        self._schedule.num_steps = step + 1
        self._schedule.step(0)
        return self.lr / self.config.lr if self.config.lr else 0.0

    @property
    def lr(self) -> float:
        """Return the current learning rate."""
        return float(self.megatron.param_groups[0]["lr"])

    def step(self) -> float:
        """Clip and apply the gradients; return their norm before clipping."""
        success, grad_norm, _ = self.megatron.step()
        assert success, "only loss scaling, which is not used, can skip a step"
        return float(grad_norm)
