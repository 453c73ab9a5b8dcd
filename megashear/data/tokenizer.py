"""The former place of `megashear.tokenizer`, for programs that import it from here."""

from megashear.tokenizer.convert import save_for_transformers
from megashear.tokenizer.load import load_tokenizer

__all__ = ["load_tokenizer", "save_for_transformers"]
