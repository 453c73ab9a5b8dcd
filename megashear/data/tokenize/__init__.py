"""Text to token files: what `megashear tokenize` does. Imports neither torch nor Megatron."""
