#!/usr/bin/env bash
# torch 2.13.0, Python 3.11.
#
# torch.distributed.checkpoint raises CheckpointException for what goes wrong on a rank (a size that
# does not fit, a missing key, a missing file). It is a BaseException and no Exception. A trainer
# that tries the newest checkpoint and falls back to an older one in `except Exception` never falls
# back: the process ends. The ValueError or RuntimeError behind it is in `failures`, by rank.
#
# Seen: size mismatch -> CheckpointException, Exception: False, failures[0]: ValueError
#       missing key   -> CheckpointException, Exception: False, failures[0]: RuntimeError
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0
venv/bin/python -W ignore - <<'PY'
import torch
import torch.distributed.checkpoint as dcp

dcp.save({"weight": torch.ones(8, 4)}, checkpoint_id="checkpoint")
for name, state, cause in (
    ("size mismatch", {"weight": torch.zeros(6, 4)}, ValueError),
    ("missing key", {"bias": torch.zeros(4)}, RuntimeError),
):
    fell_back = False
    try:
        try:
            dcp.load(state, checkpoint_id="checkpoint")
        except Exception:
            fell_back = True
    except BaseException as error:
        behind = error.failures[0][0]
        print(
            f"{name}: {type(error).__name__}, Exception: {isinstance(error, Exception)}, "
            f"failures[0]: {type(behind).__name__}: {behind}"
        )
        assert isinstance(error, dcp.CheckpointException) and isinstance(behind, cause)
    else:
        raise SystemExit(f"{name}: an Exception now")
    assert not fell_back
PY
echo "seen again"
