"""Weights on disk: Megatron checkpoints, Hugging Face directories, and the way between them."""
