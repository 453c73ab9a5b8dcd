"""Where a run stands: device, process groups, layers, kernels. The only home of CUDA calls."""

import logging

# Megatron-Core 0.16 warns for each layer that it does not know our MLP class by name.
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
# Megatron-Core 0.19 announces on every rank and for every model that GPTModel will be frozen.
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
# And that its own writing beside training gives way to another package's.
logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)
