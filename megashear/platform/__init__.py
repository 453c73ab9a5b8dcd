"""Where a run stands: device, process groups, layers, kernels. The only home of CUDA calls."""

import logging
import warnings

# Megatron-Core says at import, several times, that Apex and Transformer Engine are absent; what is
# in use is logged once by the run. And it warns of MLP classes that it does not know by name.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
