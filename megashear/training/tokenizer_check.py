"""Compare the tokenizer that made the token files with the model's, before a run trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megashear.data.fingerprint import Fingerprint
from megashear.errors import DataError
from megashear.tokenizer.load import load_tokenizer


def check_tokenizer(
    prefixes: Sequence[str],
    tokenizer: str | None,
    generation: Mapping[str, Any],
    *,
    other_tokenizer: bool = False,
) -> list[str]:
    """Refuse token files that another tokenizer made than the model's.

    Args:
        prefixes: token files, without suffix, of one tokenizer.
        tokenizer: path of the model's tokenizer; None where it names none.
        generation: generation settings of the model, whose eos the token files should have.
        other_tokenizer: whether another tokenizer is meant.

    Returns:
        Warnings: what could not be compared, and an eos that differs.

    Raises:
        DataError: both tokenizers are known and differ; or a fingerprint is damaged.
    """
    with_json = [prefix for prefix in prefixes if Path(f"{prefix}.json").exists()]
    missing = [prefix for prefix in prefixes if prefix not in with_json]
    warnings = []
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        warnings.append(
            f"nothing is known of the tokenizer, bos and eos of {missing[0]}{more}: there is no "
            f"{missing[0]}.json. Make sure that it was made by the model's tokenizer"
        )
    if not with_json:
        return warnings
    made = Fingerprint.read(with_json[0])
    try:
        if tokenizer is None:
            raise DataError("it names none; data.tokenizer can")
        sha256 = load_tokenizer(tokenizer).sha256
    except DataError as error:
        warnings.append(f"nothing is known of the model's tokenizer: {error}")
    else:
        if sha256 != made.tokenizer_sha256 and not other_tokenizer:
            raise DataError(
                f"the tokenizer that made {with_json[0]} (sha256 {made.tokenizer_sha256[:12]}) is "
                f"not the model's, {tokenizer} (sha256 {sha256[:12]}): the same ids may stand for "
                "other text. Tokenize again with the model's, name the right one by "
                "data.tokenizer, or set data.other_tokenizer: true if this is meant, or if both "
                "are known to be one tokenizer (tokenizer.json and tokenizer.model have different "
                "hashes)"
            )
    if (ends := _eos_ids(generation)) and made.eos_id not in ends:
        warnings.append(
            f"documents of {with_json[0]} end with token {made.eos_id}, but the model's "
            f"eos_token_id is {', '.join(map(str, ends))}: an engine would not stop where the text "
            "ends"
        )
    return warnings


def _eos_ids(generation: Mapping[str, Any]) -> list[int]:
    """Return the tokens that end a text; generation_config.json wins, as in transformers."""
    for file in ("generation_config.json", "config.json"):
        ids = generation.get(file, {}).get("eos_token_id")
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []
