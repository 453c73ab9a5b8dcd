"""Tokenizers for tests, trained by the demo's own script on real text; where shared data lies."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = Path(
    os.environ.get("MEGASHEAR_SHARED_DATA", REPOSITORY.parent / "shared" / "data")
).resolve()
"""A LLaMA tokenizer and RedPajama samples; tests that read it are skipped where it is absent."""


def example(name: str) -> ModuleType:
    """A module of examples/, which is no package, by its path: `demo/collect_text`."""
    path = REPOSITORY / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def real_texts() -> list[str]:
    """Functions and classes of a few standard modules, 200 at most: spaces, tabs and all."""
    import argparse
    import inspect as inspector
    import json.decoder
    import textwrap

    texts = []
    for module in (argparse, inspector, json.decoder, textwrap):
        texts += inspect.getsource(module).split("\n\n\n")
    return [text for text in texts if text.strip()][:200]


def write_jsonl(path: Path, records: Sequence[Any]) -> Path:
    """One record a line; a string stands for a record with that text."""
    lines = (json.dumps({"text": r} if isinstance(r, str) else r) for r in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def make_tokenizer(folder: Path, vocab_size: int = 500) -> Path:
    """A small tokenizer with LLaMA's settings, as the demo trains it; the folder."""
    source = write_jsonl(folder / "source.jsonl", real_texts())
    example("demo/train_tokenizer").train([source], folder, vocab_size)
    return folder
