"""Megatron-Core's data parallelism, optimizer and schedule, put together for a run."""

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
        chunks: this rank's part of the model, without data parallelism around it.
        config: the schedule's and AdamW's numbers.
        parallel: whether its state is distributed, and what overlaps.
        steps: length of the run.

    Attributes:
        chunks: as given: what checkpoints hold.
        models: the same in Megatron-Core's DistributedDataParallel; gradients are in `main_grad`.
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
        # Only the first chunk's gradients are reduced in several buckets, as in Megatron-LM: those
        # of the others are ready long before the backward pass ends.
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
        if parallel.overlap_grad_reduce:  # reduces with the last micro-batch alone
            no_sync = [model.no_sync for model in self.models]
            model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for model in self.models:
            model.zero_grad_buffer()
        self.megatron.zero_grad()

    def owned(self, parameter: torch.nn.Parameter) -> range:
        """Positions of a parameter, flattened, whose reduced gradient and state this rank has.

        All of them, but with a distributed optimizer: its buckets are cut evenly over the ranks
        that see other tokens, wherever a parameter begins.
        """
        size = parameter.numel()
        if not self.parallel.distributed_optimizer:
            return range(size)
        groups = (model.param_to_bucket_group.get(parameter) for model in self.models)
        group = next(group for group in groups if group is not None)
        bucket = next(bucket for bucket in group.buckets if parameter in bucket.params)
        gradient: Any = parameter.main_grad  # type: ignore[attr-defined]
        begin = gradient.storage_offset() - bucket.grad_data.storage_offset()
        share = bucket.grad_data.numel() // group.intra_distributed_optimizer_instance_size
        first = group.intra_distributed_optimizer_instance_rank * share - begin
        return range(min(max(first, 0), size), min(max(first + share, 0), size))

    def master(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """The float32 weights that the optimizer keeps beside bf16 ones, where `owned`, flattened.

        None under fp32: the parameter is its own.
        """
        main = getattr(parameter, "main_param", None)  # Megatron-Core's name
        return None if main is None else main.detach().view(-1)

    def collect(self) -> None:
        """Give all ranks the weights that their owners alone have put in order.

        With `overlap_param_gather` that is done before each use, by `gather`.
        """
        if self.parallel.distributed_optimizer and not self.parallel.overlap_param_gather:
            for model in self.models:
                model.start_param_sync()

    def gather(self, *, wait: bool = False) -> None:
        """With `overlap_param_gather`: begin to collect all weights from the ranks that own them.

        Modules wait for theirs before their forward pass. Without it a step has done that.

        Args:
            wait: return when all are there.
        """
        if self.parallel.overlap_param_gather:
            for model in self.models:
                model.start_param_sync(force_sync=wait)

    def begin_step(self, step: int) -> float:
        """Set the learning rate of the step after `step` completed ones; returns it as a share.

        The share (of the configured lr) is a function of the step alone: nothing to resume.
        """
        self._schedule.num_steps = step + 1
        self._schedule.step(0)
        return self.lr / self.config.lr if self.config.lr else 0.0

    @property
    def lr(self) -> float:
        """Learning rate in force."""
        return float(self.megatron.param_groups[0]["lr"])

    def step(self) -> float:
        """Clip and apply the gradients; returns their norm before clipping."""
        success, grad_norm, _ = self.megatron.step()
        assert success, "only loss scaling, which is not used, can refuse a step"
        return float(grad_norm)
