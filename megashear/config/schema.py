"""The fields of a run's YAML file, as frozen dataclasses; the comment of a field documents it.

Nothing is checked here; `validate` does that.
This module imports only the standard library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

STAGES = ("pretrain", "prune", "continue")
QUERY_GROUP, QUERY_HEAD = HEAD_UNITS = ("query_group", "query_head")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures by their model_type in Hugging Face's terms."""
ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary embeddings are scaled to longer sequences, in config.json's terms.

    `dynamic` acts only beyond `max_position_embeddings`, which no sequence here exceeds. Of
    `llama3`, Megatron-Core supports only low_freq_factor 1, high_freq_factor 4 and 8192 original
    positions.
    """

    rope_type: str  # linear | dynamic | llama3 | yarn
    factor: float
    original_max_position_embeddings: int | None = None  # llama3, yarn
    beta_fast: float = 32.0  # yarn, as all below
    beta_slow: float = 1.0
    truncate: bool = True  # whether the bounds of the ramp are rounded
    attention_factor: float | None = None  # of cos and sin; default: 0.1 ln(factor) + 1


@dataclass(frozen=True)
class ModelShape:
    """Sizes that define a LLaMA-architecture model, under Megatron-Core's names.

    `num_query_groups` and `kv_channels` default to `num_attention_heads` (multi-head attention) and
    `hidden_size // num_attention_heads`.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    vocab_size: int
    num_query_groups: int = 0
    kv_channels: int = 0  # size of one head
    max_position_embeddings: int = 4096
    rotary_base: float = 10000.0
    layernorm_epsilon: float = 1e-5
    tied_embeddings: bool = False
    qkv_bias: bool = False  # of linear_qkv alone
    proj_bias: bool = False  # of linear_proj
    mlp_bias: bool = False  # of linear_fc1 and linear_fc2
    qk_norm: bool = False  # an RMSNorm over each query and key head, one weight for all heads
    rotary_scaling: RotaryScaling | None = None
    sliding_window: int | None = None  # tokens that a token sees, itself among them; default: all
    family: str = "llama"  # to be exported as, where that architecture has all that the model has

    def __post_init__(self) -> None:
        if self.num_query_groups == 0:
            object.__setattr__(self, "num_query_groups", self.num_attention_heads)
        if self.kv_channels == 0 and self.num_attention_heads > 0:
            object.__setattr__(self, "kv_channels", self.hidden_size // self.num_attention_heads)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups


@dataclass(frozen=True)
class TargetShape:
    """The shape to prune to; a size left out stays as in the source model."""

    num_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    ffn_hidden_size: int | None = None


@dataclass(frozen=True)
class PruningConfig:
    """How the masks are learned (docs/masks.md); defaults are the paper's."""

    sparsity_warmup_steps: int = 640  # steps over which the target sparsity rises from 0
    mask_lr: float = 1.0  # at its peak, on the schedule of optimizer.lr
    multiplier_lr: float = 1.0  # likewise
    head_unit: str = QUERY_GROUP  # query_group: with its key and value; query_head: they all stay
    multipliers: str = "shared"  # shared: one pair per mask; per_layer: one pair per row
    clip_grad: float = 1.0  # norm at which mask and multiplier gradients are clipped, each apart


@dataclass(frozen=True)
class Domain:
    """A source of text: token files without their .bin/.idx suffix, and a weight in the blend."""

    name: str
    train: str  # token files
    valid: str  # token files that losses are measured on
    weight: float  # initial fraction of the samples; those of all domains sum to 1
    reference_loss: float | None = None  # nats per token; needed by every rule but `constant`
    min_weight: float = 0.0  # bounds that an update of the weights keeps to
    max_weight: float = 1.0
    # Samples of the domain that earlier stages have read: training starts after them. The order of
    # samples is the same only with the same data.seed, data.seq_length and train file.
    first_sample: int = 0


@dataclass(frozen=True)
class DataConfig:
    """Domains and the rule by which their weights move (docs/data-design.md)."""

    seq_length: int = 4096  # tokens
    rule: str = "paper"  # paper | reference_code | constant
    eta: float = 1.0  # strength of an update of the weights
    smoothing: float = 1e-4  # fraction of all weight that an update spreads evenly over the domains
    seed: int = 1234  # order of samples
    num_workers: int = 0  # loader processes per rank
    index_cache: str | None = None  # directory of epoch indices; default: beside the token files
    reset_attention_mask: bool = False  # no token attends to an earlier document of its sample
    domains: tuple[Domain, ...] = ()
    # A run whose domains, references and final weights to take, or a YAML file of domains.
    domains_from: str | None = None
    # Stage continue with domains_from reads on where that run stopped; true: from sample 0 again.
    reread_domains: bool = False
    tokenizer: str | None = None  # directory or file copied into exports
    # Train although another tokenizer than the model's made the token files.
    other_tokenizer: bool = False


@dataclass(frozen=True)
class EvaluationConfig:
    """Per-domain validation."""

    interval: int = 50  # steps
    # Of validation text, at most, at each evaluation. The paper's 500 would add 74% to the
    # computation of pruning, 32 add 4.7%.
    sequences_per_domain: int = 32
    masks: str = "current"  # current | target: which deterministic masks, in stage prune


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for the weights, with linear warm-up and cosine decay."""

    lr: float = 1e-4  # at its peak
    min_lr_ratio: float = 0.1  # lr at the last step / lr
    warmup_steps: int = 320  # over which lr rises from 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # norm


@dataclass(frozen=True)
class TrainerConfig:
    """Length of the run and what happens on the way."""

    steps: int = 3200
    global_batch_size: int = 32  # sequences per optimizer step
    micro_batch_size: int = 4  # sequences per forward pass and data-parallel rank
    log_interval: int = 10  # steps
    save_interval: int = 200  # steps
    keep_checkpoints: int = 2  # newest ones kept
    async_save: bool = False  # train on while a checkpoint is written
    seed: int = 1234  # initial weights and mask noise


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is split over processes; the remaining factor is data parallelism."""

    tensor: int = 1  # ranks that share each layer
    sequence: bool = False  # split what tensor parallelism repeats (norms, residual) by tokens
    pipeline: int = 1  # stages
    virtual_pipeline: int = 1  # chunks of layers per stage; above 1 their schedules interleave
    context: int = 1  # ranks that share a sequence
    distributed_optimizer: bool = False  # each data-parallel rank keeps a part of its state
    overlap_grad_reduce: bool = False  # reduce gradients during the backward pass
    overlap_param_gather: bool = False  # gather updated weights during the next forward pass
    recompute: str = "none"  # none | selective (core attention) | full (whole layers)

    @property
    def model_ranks(self) -> int:
        """Processes that one copy of the model and one sequence take."""
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True)
class PlatformConfig:
    """What the run computes on. `auto` takes the best that is available and logs its choice."""

    device: str = "auto"  # auto | cpu | cuda
    layers: str = "auto"  # auto | torch | transformer_engine
    kernels: str = "auto"  # auto | torch | apex
    precision: str = "auto"  # auto (bf16 on cuda, fp32 on cpu) | fp32 | bf16
    loader: str = "torch"  # torch | dali: what fetches training batches ahead
    timeout_minutes: float = 10.0  # without progress: more than a load or a save takes

    def precision_on(self, cuda: bool) -> str:
        """Return the precision that `auto` stands for on this kind of device, or the one given."""
        auto = "bf16" if cuda else "fp32"
        return auto if self.precision == "auto" else self.precision


@dataclass(frozen=True)
class LogConfig:
    """Views of a run in addition to metrics.jsonl, which always has every record."""

    tensorboard: bool = False  # event files in the run directory
    wandb: str = "disabled"  # disabled | offline (in the run directory, for `wandb sync`) | online
    wandb_project: str = "megashear"  # where W&B shows the run


@dataclass(frozen=True)
class RunConfig:
    """One YAML file: a whole run."""

    stage: str
    run_dir: str
    init_from: str | None = None  # a checkpoint, a run directory or a Hugging Face directory
    model: ModelShape | None = None  # stage pretrain only: the shape to initialise at random
    target: TargetShape | None = None  # stage prune: the shape to reach, or
    target_sparsity: float | None = None  # fraction of the source's parameters to remove, any shape
    pruning: PruningConfig = field(default_factory=PruningConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    platform: PlatformConfig = field(default_factory=PlatformConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def evaluation_cost(self, sequences: int) -> float:
        """Return the compute of all evaluations as a fraction of that of training.

        A forward pass costs a third of training on the same tokens, and a quarter where layers are
        recomputed.

        Args:
            sequences: sequences of one evaluation, over all domains and ranks.
        """
        evaluations = 1 + math.ceil(self.trainer.steps / self.evaluation.interval)
        passes = 4 if self.parallel.recompute == "full" else 3
        trained = self.trainer.steps * self.trainer.global_batch_size
        return evaluations * sequences / (passes * trained)
