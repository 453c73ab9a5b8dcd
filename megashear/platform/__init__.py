"""What a run stands on: device, process groups, layers, kernels. The only home of CUDA calls."""

import logging

# Megatron-Core 0.16 warns for each layer that it does not know our MLP class.
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
# Megatron-Core 0.19 announces on every rank and for every model that GPTModel will be frozen.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
# It also announces that its own background writer will be replaced by another package.
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)
