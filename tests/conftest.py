"""Settings for every test: one thread a process, and nothing written into the checkout."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

# Before torch is imported. More threads than cores make several ranks on one machine crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# GPUs are counted without starting CUDA, which no fork of this process could use after that.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import pytest
import torch
from hypothesis import configuration, settings

# A shell's background jobs ignore Ctrl-C, and what they start inherits it.
signal.signal(signal.SIGINT, signal.default_int_handler)

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "megashear-hypothesis")
# Random outside of CI, so that cases never seen before turn up where somebody can look at them.
settings.register_profile("megashear", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("megashear")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option of `make test-all`."""
    parser.addoption("--long", action="store_true", help="run also the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what takes minutes unless it is asked for, and what needs a GPU where there is none."""
    long = config.getoption("--long") or config.option.markexpr == "long"
    for item in items:
        if item.get_closest_marker("long") and not long:
            item.add_marker(pytest.mark.skip(reason="run by `make test-long`"))
        if item.get_closest_marker("gpu") and not torch.cuda.device_count():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
