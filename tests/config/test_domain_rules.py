"""Rules of the domains: their names, weights and references."""

from __future__ import annotations

import pytest

from tests.support.config_rules import PRUNE, change, found, only


def test_none() -> None:
    only("data.domains", "is empty", data__domains=())
    assert found(data__domains=(), data__domains_from="earlier") == []


def test_weights_sum_to_one() -> None:
    only("data.domains", "sum to 0.98; they must sum to 1", data__domains__1__weight=0.23)
    assert found(data__domains__1__weight=0.2505) == []
    only("data.domains", "sum to 1.002", data__domains__1__weight=0.252)


def test_bounds_of_weights() -> None:
    bounds = {"data__domains__0__min_weight": 0.5, "data__domains__0__max_weight": 0.75}
    assert found(**bounds, data__domains__1__max_weight=0.25) == []
    for low, high in ((-0.1, 1.0), (0.8, 0.7), (0.0, 1.1)):
        only("data.domains[1].min_weight", f"= {low:g} and max_weight = {high:g}", "0 <=",
             data__domains__1__min_weight=low, data__domains__1__max_weight=high)  # fmt: skip
    only("data.domains[1].weight", "= 0.25 is not between min_weight = 0.3",
         data__domains__1__min_weight=0.3)  # fmt: skip


def test_bounds_that_no_weights_keep_to() -> None:
    config = change(PRUNE, "data.domains.0.min_weight", 0.75)
    config = change(config, "data.domains.0.max_weight", 0.75)
    only("data.domains", "max_weight sums to 0.9995", config=config,
         data__domains__1__weight=0.2495, data__domains__1__max_weight=0.2495)  # fmt: skip
    only("data.domains", "min_weight sums to 1.0005", config=config,
         data__domains__1__weight=0.2505, data__domains__1__min_weight=0.2505)  # fmt: skip


def test_attention_within_documents_under_context_parallelism() -> None:
    options = {"data__reset_attention_mask": True, "parallel__context": 2}
    only("data.reset_attention_mask", "parallel.context = 2", "platform.layers = 'torch'",
         **options)  # fmt: skip
    assert found(**options, platform__layers="torch") == []
    assert found(data__reset_attention_mask=True) == []


def test_weights_are_shares() -> None:
    config = change(PRUNE, "data.domains.0.weight", 1.25)
    result = dict(found(config, data__domains__1__weight=-0.25))
    assert list(result) == ["data.domains[0].weight", "data.domains[1].weight"]
    text = "= -0.25 is not between min_weight = 0 and max_weight = 1"
    assert result["data.domains[1].weight"] == text


def test_names_differ() -> None:
    only("data.domains", "2 domains are named 'cc'", data__domains__1__name="cc")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x", "é", "cc\n"])
def test_names_can_name_files(name: str) -> None:
    only("data.domains[0].name", "letters, digits", data__domains__0__name=name)


@pytest.mark.parametrize("rule", ["paper", "reference_code"])
def test_references(rule: str) -> None:
    config = change(PRUNE, "data.domains.0.reference_loss", None)
    only("data.domains", "no reference_loss for cc, ", rule, "nats per token",
         config=config, data__rule=rule)  # fmt: skip
    only("data.domains", "for cc, wiki, ", config=config, data__rule=rule,
         data__domains__1__reference_loss=None)  # fmt: skip
    assert found(config, data__rule="constant") == []


def test_a_reference_is_positive() -> None:
    only("data.domains[1].reference_loss", "> 0", data__domains__1__reference_loss=0.0)
