"""Attention that stays within documents: the same as each document alone, in every layout."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from torch import Tensor

from megashear.config.schema import Domain, ParallelConfig, RunConfig
from megashear.data.dataset import build_train_dataset, build_valid_datasets
from megashear.data.domain_weights import DomainWeights
from megashear.data.fingerprint import Fingerprint
from megashear.data.loader import micro_batch
from megashear.errors import DataError
from megashear.model.build import build_model
from megashear.platform import parallel
from megashear.platform.parallel import single_process
from megashear.training.step import within_documents
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.make_data import random_documents, write_tokens
from tests.support.runs import GQA, records, run_config, write_source

EOS, SEQ = 0, 16
SHAPE = replace(GQA, num_layers=4)
LAYOUTS = {
    "recompute-full": (1, ParallelConfig(recompute="full")),
    "tp2-sp-recompute-selective": (
        2,
        ParallelConfig(tensor=2, sequence=True, recompute="selective"),
    ),
    "pp2-interleaved": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "pp2-cp2": (4, ParallelConfig(pipeline=2, context=2)),
}


def texts() -> Tensor:
    """[b, s + 1]: with an eos at either end, several in a row, none, and nothing else."""
    tokens = torch.randint(1, 64, (6, SEQ + 1), generator=torch.Generator().manual_seed(0))
    for row, places in enumerate(([5, 9], [0, 15], [16], [3, 4, 5], [], range(SEQ + 1))):
        tokens[row, list(places)] = EOS
    return tokens


def test_positions_and_mask_are_megatrons() -> None:
    batch = micro_batch(texts(), torch.zeros(6, dtype=torch.int64), EOS)
    mask = within_documents(batch["document_ids"])[:, None]
    assert mask.dtype == torch.bool and mask.shape == (6, 1, SEQ, SEQ)
    for row, tokens in enumerate(batch["tokens"]):
        theirs, loss_mask, positions = _get_ltor_masks_and_position_ids(
            tokens, EOS, True, True, False, True
        )
        assert torch.equal(mask[row], theirs)
        assert torch.equal(batch["position_ids"][row], positions)
        assert torch.equal(batch["loss_mask"][row], loss_mask)
    plain = micro_batch(texts(), torch.zeros(6, dtype=torch.int64))
    assert "document_ids" not in plain
    assert plain["position_ids"].tolist() == [list(range(SEQ))] * 6


def test_a_document_in_a_sample_has_the_logits_that_it_has_alone() -> None:
    with single_process() as platform, torch.no_grad():
        (model,) = build_model(SHAPE, platform, ParallelConfig(), SEQ)
        batch = micro_batch(texts()[:5], torch.zeros(5, dtype=torch.int64), EOS)
        mask = within_documents(batch["document_ids"])[:, None]
        packed = model(batch["tokens"], batch["position_ids"], mask)
        unmasked = model(batch["tokens"], batch["position_ids"], None)
        alone, documents = torch.empty_like(packed), 0
        for row, ids in enumerate(batch["document_ids"]):
            for number in range(int(ids.max()) + 1):
                here = ids == number
                tokens = batch["tokens"][row, here][None]
                positions = torch.arange(tokens.shape[1])[None]
                alone[row, here] = model(tokens, positions, None)
                documents += 1
    assert documents == 3 + 2 + 1 + 4 + 1
    assert (packed - alone).abs().max() < 1e-5 * alone.abs().max()
    assert (unmasked - alone).abs().max() > 0.1 * alone.abs().max()


def write_domain(directory: Path) -> Domain:
    """Documents of a few tokens, with the fingerprint that tells what ends them."""
    files = {}
    for seed, part in enumerate(("train", "valid")):
        documents = random_documents(3000, 64, seed=seed, mean=5)
        files[part] = write_tokens(directory / part, documents, 64)
        fingerprint = Fingerprint("0" * 64, 64, None, EOS, len(documents), 3000)
        Path(f"{files[part]}.json").write_text(json.dumps(asdict(fingerprint)))
    return Domain("a", files["train"], files["valid"], 1.0, reference_loss=4.0)


def configuration(directory: Path, domain: Domain, reset: bool, **changes: Any) -> RunConfig:
    """Two steps from the source beside the domain's files."""
    source = str(Path(domain.train).parent / "source")
    config = run_config(directory, (domain,), stage="continue", init_from=source, **changes)
    trainer = replace(config.trainer, steps=2, global_batch_size=8, micro_batch_size=2)
    data = replace(config.data, reset_attention_mask=reset)
    return replace(config, trainer=trainer, data=data)


def train(config: RunConfig) -> None:
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    Trainer(config, platform).run()
    parallel.stop()


def losses_of(config: RunConfig, ranks: int) -> list[float]:
    """Of two steps, and of the evaluations before and after them."""
    run_distributed(train, ranks, config)
    found = records(config.run_dir)
    return [r["loss"] if r["kind"] == "step" else r["losses"]["a"] for r in found]


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    directory = tmp_path_factory.mktemp("documents")
    run_distributed(write_source, 1, directory, SHAPE)
    return write_domain(directory)


@pytest.fixture(scope="module")
def expected(domain: Domain, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    directory = tmp_path_factory.mktemp("one")
    within = losses_of(configuration(directory / "within", domain, True), 1)
    across = losses_of(configuration(directory / "across", domain, False), 1)
    assert len(within) == 4
    assert all(abs(a - b) > 1e-4 for a, b in zip(within, across, strict=True))
    return within


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_masks_alike(
    name: str, domain: Domain, expected: list[float], tmp_path: Path
) -> None:
    ranks, layout = LAYOUTS[name]
    config = configuration(tmp_path, domain, True, parallel=layout)
    assert losses_of(config, ranks) == pytest.approx(expected, rel=1e-5)


def test_without_a_fingerprint_nothing_says_what_ends_a_document(tmp_path: Path) -> None:
    domain = write_domain(tmp_path)
    Path(f"{domain.valid}.json").unlink()
    data = configuration(tmp_path, domain, True).data
    build_train_dataset(data, 64, DomainWeights.from_config(data))
    with pytest.raises(DataError, match=r"no .*valid\.json: .*tokenize.*reset_attention_mask"):
        build_valid_datasets(data, 64)
