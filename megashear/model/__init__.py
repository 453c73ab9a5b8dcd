"""The masked GPT model: Megatron-Core's layers, each with a statement of how masks act on it."""
