"""megashear: structured pruning and dynamic batch loading for Megatron-Core (Sheared LLaMA)."""

__version__ = "0.1.0"
