"""The masked GPT model: Megatron-Core's layers, and how masks act on their weights."""
