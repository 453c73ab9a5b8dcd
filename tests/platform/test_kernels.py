"""Apex is taken where its compiled kernels are, and asked for by name only there."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

from megashear.errors import PlatformError
from megashear.platform.kernels import choose_kernels

absent = pytest.mark.skipif(find_spec("amp_C") is not None, reason="NVIDIA's Apex is installed")


@absent
def test_without_apex_it_is_torch_and_apex_by_name_is_an_error() -> None:
    assert choose_kernels("auto") == choose_kernels("torch") == "torch"
    with pytest.raises(PlatformError, match=r"platform\.kernels = apex.*from NVIDIA's sources"):
        choose_kernels("apex")


@absent
def test_the_unrelated_package_of_that_name_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    assert choose_kernels("auto") == "torch"
    with pytest.raises(PlatformError):
        choose_kernels("apex")


def test_apex_is_named_where_it_is_since_megatron_takes_it_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizers = SimpleNamespace(FusedAdam=object)
    modules = {
        "amp_C": ModuleType("amp_C"),
        "apex": ModuleType("apex"),
        "apex.optimizers": optimizers,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert [choose_kernels(asked) for asked in ("auto", "apex", "torch")] == ["apex"] * 3
