"""A tokenizer at a path: its files read by one rule, for tokenization and for exports alike.

Imports the standard library, `errors`, and the libraries of tokenizers; never torch or Megatron.
"""
