"""What the commands share: their parser, types of options, and checks that need no torch.

Imports the standard library, `errors` and `files` only.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megashear.errors import CheckpointError, DataError
from megashear.files import hub_hint

MODEL_FILES = (
    *("config.json", "checkpoint.json", "checkpoints/latest"),
    *("latest_checkpointed_iteration.txt", ".metadata"),
)
"""Each marks a model's directory: Hugging Face's, a checkpoint, a run, or Megatron-LM's."""


class Parser(argparse.ArgumentParser):
    """A parser that keeps the layout of help texts, and names the nearest option or choice.

    Attributes:
        trailing: name of the list that takes `key.sub=value` words behind the options, if any.
    """

    trailing: str | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is left over with this command's own usage."""
        parsed, rest = super().parse_known_args(args, namespace)
        if self.trailing and all("=" in word and not word.startswith("-") for word in rest):
            getattr(parsed, self.trailing).extend(rest)
        elif rest:
            known = list(self._option_string_actions)
            near = [difflib.get_close_matches(word.partition("=")[0], known, 1) for word in rest]
            hint = f". Did you mean {near[0][0]}?" if near[0] else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return parsed, []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = difflib.get_close_matches(str(value), map(str, action.choices or ()), 1)
            if near:
                error.message = f"invalid choice: {value!r}. Did you mean {near[0]!r}?"
            raise


def positive(text: str) -> int:
    """Convert an option's text to a whole number above 0; `1.3e9` is one too."""
    number = float(text)
    if not number >= 1 or number % 1:  # infinity % 1 is NaN, which is true
        raise ValueError
    return int(number)


def require_model(path: str | Path, shape: Path | None = None) -> None:
    """Refuse a path that no model can be at, before anything heavy is imported.

    Args:
        path: of a model.
        shape: the value of --shape; with it, only Megatron-LM's reader knows what belongs there.

    Raises:
        CheckpointError: the path is missing, or a directory without a model.
    """
    if any(Path(path, name).is_file() for name in MODEL_FILES):
        return
    if Path(path).exists():
        if shape is not None:
            return
        raise CheckpointError(
            f"{path}: is neither a checkpoint nor a run with one, nor a Hugging Face directory. "
            "Give a directory with checkpoint.json, checkpoints/latest or config.json"
        )
    raise CheckpointError(missing(path))


def missing(path: str | Path) -> str:
    """Return the message for a model that is not here, with the command that fetches it."""
    hint = hub_hint(path)
    return f"{path}: does not exist" + (f". {hint}" if hint else "")


def require_outputs(files: Sequence[Path], overwrite: bool, problems: Sequence[str] = ()) -> None:
    """Refuse, before anything is computed, files that could not be written.

    Raises:
        DataError: with every problem, after the `problems` found already.
    """
    found = list(problems)
    for file in files:
        if file.is_dir():
            found.append(f"{file}: is a directory")
        elif file.exists() and not overwrite:
            found.append(f"{file}: there already. Replace by --overwrite")
        if not file.parent.is_dir():
            found.append(f"{file.parent}: there is no such directory")
    if found:
        raise DataError("\n".join(dict.fromkeys(found)))
