"""Where a run stands: device, process groups, layer backend, kernels. The only home of CUDA calls."""
