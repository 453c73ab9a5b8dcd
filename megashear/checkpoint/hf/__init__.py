"""Hugging Face directories: settings, tensors, tokenizers."""
