"""Check that transformers reads a directory's tokenizer as the token files were made."""

from __future__ import annotations

from pathlib import Path

from megashear.tokenizer.load import load_tokenizer

PROBE = (
    "Hello world, 12345",
    "  def f(x):\n\treturn x ** 2  # two\n\n",
    "It's 3.14, isn't it? {\"a\": [1, 20, 300]}",
    "Zürich, Malmö, 日本語",
)
"""Texts whose ids differ between the tokenizers of transformers' families."""


def difference_from_transformers(directory: Path) -> str:
    """Return where `AutoTokenizer` reads a model directory otherwise than we do, else "".

    transformers chooses a class by config.json's `model_type` and by tokenizer_config.json, and a
    class may replace parts of tokenizer.json by its own (5.23: all of them under qwen2).

    Raises:
        DataError: we cannot read the tokenizer.
    """
    import transformers

    ours = load_tokenizer(directory)
    begin = [] if ours.bos_id is None else [ours.bos_id]
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(
            str(directory),
            local_files_only=True,
            trust_remote_code=False,
            mistral_format=False,  # by its files: mistral-common may be installed, and incomplete
        )
        found = [theirs(text)["input_ids"] for text in PROBE]
    except Exception as error:  # whatever its classes raise
        return f"AutoTokenizer cannot load it: {error!r:.300}"
    finally:
        transformers.logging.set_verbosity(level)
    for text, ids, right in zip(PROBE, found, ours.encode(PROBE), strict=True):
        if ids != begin + right:
            how = f"AutoTokenizer ({type(theirs).__name__}) reads {text!r} as {ids[:8]}..."
            return f"{how}; its files say {(begin + right)[:8]}..."
    if theirs.eos_token_id != ours.eos_id:
        return f"AutoTokenizer's eos is {theirs.eos_token_id}; its files say {ours.eos_id}"
    return ""
