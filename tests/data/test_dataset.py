"""Samples of a domain and of the blend, against the token files and Megatron's BlendedDataset."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_dataset import BlendedDataset

from megashear.config.schema import DataConfig, Domain
from megashear.data.dataset import (
    Blend,
    DomainDataset,
    DynamicBlendedDataset,
    build_train_dataset,
    build_valid_datasets,
)
from megashear.data.domain_weights import DomainWeights, Segment
from megashear.errors import DataError
from tests.support.make_data import counting_documents, random_documents, write_tokens

VOCAB = 500
Weights = tuple[float, ...]


def open_domain(
    prefix: str,
    seq_length: int = 16,
    vocab: int = VOCAB,
    seed: int = 1234,
    name: str = "cc",
    dataset_id: int = 0,
) -> DomainDataset:
    return DomainDataset(
        name, prefix, seq_length=seq_length, vocab_size=vocab, seed=seed, dataset_id=dataset_id
    )


def blend_of(
    tmp_path: Path, weights: Weights, sizes: list[int] | None = None, seq_length: int = 16
) -> DynamicBlendedDataset:
    names = [f"d{number}" for number in range(len(weights))]
    members = [
        open_domain(
            write_tokens(
                tmp_path / name, random_documents((sizes or [3000] * 9)[number], VOCAB), VOCAB
            ),
            name=name,
            dataset_id=number,
            seq_length=seq_length,
        )
        for number, name in enumerate(names)
    ]
    return DynamicBlendedDataset(members, DomainWeights(names, weights, {}))


def set_segments(blend: DynamicBlendedDataset, *segments: tuple[int, tuple[float, ...]]) -> None:
    blend.domain_weights.segments = tuple(Segment(first, weights) for first, weights in segments)


class TestDomain:
    def test_an_epoch_reads_each_token_once_and_each_epoch_in_another_order(
        self, tmp_path: Path
    ) -> None:
        # every token id occurs once in the file, so a token says where it came from
        domain = open_domain(
            write_tokens(tmp_path / "cc", counting_documents(1001), 1001), 16, 1001
        )
        assert domain.samples_per_epoch == 1000 // 16
        orders = []
        for epoch in range(3):
            first = epoch * domain.samples_per_epoch
            samples = [domain[first + k][:-1] for k in range(domain.samples_per_epoch)]
            tokens = np.concatenate(samples).tolist()
            assert len(tokens) == len(set(tokens)) == 62 * 16  # 992 of 1001; the rest is dropped
            orders.append(tokens)
        assert len({tuple(order) for order in orders}) == 3

    def test_a_sample_is_consecutive_text_running_over_documents(self, tmp_path: Path) -> None:
        domain = open_domain(write_tokens(tmp_path / "cc", counting_documents(701), 701), 32, 701)
        for k in range(domain.samples_per_epoch):
            text = domain[k].tolist()
            assert len(text) == 33
            jumps = [(a, b) for a, b in itertools.pairwise(text) if b != a + 1]
            assert jumps  # 33 tokens cannot stand in documents of 7
            assert all((a + 1) % 7 == 0 or a == 700 for a, _ in jumps)
            assert all(b % 7 == 0 for _, b in jumps)

    def test_samples_do_not_depend_on_what_was_read_before(self, tmp_path: Path) -> None:
        prefix = write_tokens(tmp_path / "cc", random_documents(700, VOCAB), VOCAB)
        domain = open_domain(prefix)
        expected = [domain[k].tolist() for k in range(200)]
        domain = open_domain(prefix)
        for k in np.random.default_rng(0).permutation(200).tolist():
            assert domain[k].tolist() == expected[k]

    def test_seed_and_domain_choose_the_order(self, tmp_path: Path) -> None:
        prefix = write_tokens(tmp_path / "cc", random_documents(3000, VOCAB), VOCAB)

        def order(**key: Any) -> list[list[int]]:
            domain = open_domain(prefix, **key)
            return [domain[k].tolist() for k in range(20)]

        assert order() == order()
        assert order(seed=1235) != order() != order(name="wiki")

    def test_only_two_epochs_are_held(self, tmp_path: Path) -> None:
        domain = open_domain(write_tokens(tmp_path / "cc", random_documents(700, VOCAB), VOCAB))
        for k in range(10 * domain.samples_per_epoch):
            domain[k]
        assert len(domain._epochs) == 2

    @pytest.mark.parametrize(("tokens", "samples"), [(17, 1), (32, 1), (33, 2)])
    def test_the_shortest_files(self, tmp_path: Path, tokens: int, samples: int) -> None:
        domain = open_domain(write_tokens(tmp_path / "cc", random_documents(tokens, VOCAB), VOCAB))
        assert domain.samples_per_epoch == samples
        assert [domain[k].shape for k in range(3)] == [(17,)] * 3

    def test_a_file_shorter_than_a_sample_is_refused(self, tmp_path: Path) -> None:
        prefix = write_tokens(tmp_path / "cc", random_documents(16, VOCAB), VOCAB)
        with pytest.raises(DataError, match=r"cc\.bin holds 16 tokens.* 17 .*data\.seq_length"):
            open_domain(prefix)

    def test_a_token_outside_the_vocabulary_names_the_file(self, tmp_path: Path) -> None:
        prefix = write_tokens(tmp_path / "cc", [[1, 2, 3, 499] * 30], VOCAB)
        assert open_domain(prefix)[0].max() == 499
        with pytest.raises(DataError, match=r"cc\.bin holds token id 499, .* ends at 498"):
            open_domain(prefix, vocab=499)[0]
        negative = write_tokens(tmp_path / "n", [[1, 2, -1] * 30], 100_000)
        with pytest.raises(DataError, match=r"n\.bin holds token id -1"):
            open_domain(negative)[0]

    def test_ids_beyond_16_bits(self, tmp_path: Path) -> None:
        prefix = write_tokens(tmp_path / "cc", [list(range(99_900, 100_000))], 100_000)
        assert open_domain(prefix, vocab=100_000)[0].min() >= 99_900

    def test_damaged_files_are_refused(self, tmp_path: Path) -> None:
        prefix = write_tokens(tmp_path / "cc", random_documents(700, VOCAB), VOCAB)
        index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        whole_index, whole_tokens = index.read_bytes(), tokens.read_bytes()
        for damaged in (b"", whole_index[:20], whole_index[:-1], b"x" * len(whole_index)):
            index.write_bytes(damaged)
            with pytest.raises(DataError, match=r"cc\.idx is not a complete Megatron token index"):
                open_domain(prefix)
        index.write_bytes(whole_index)
        tokens.write_bytes(whole_tokens[:-2])
        with pytest.raises(DataError, match=r"cc\.bin is 1398 bytes long, but .* 1400"):
            open_domain(prefix)
        tokens.write_bytes(b"")
        with pytest.raises(DataError, match="holds no tokens"):
            open_domain(prefix)

    def test_every_file_that_cannot_be_read_is_named_at_once(self, tmp_path: Path) -> None:
        good = write_tokens(tmp_path / "good", random_documents(700, VOCAB), VOCAB)
        short = write_tokens(tmp_path / "short", random_documents(5, VOCAB), VOCAB)
        domains = (
            Domain("a", good, good, 0.5),
            Domain("b", short, good, 0.3),
            Domain("c", str(tmp_path / "none"), good, 0.2),
        )
        config = DataConfig(seq_length=16, domains=domains, rule="constant")
        with pytest.raises(DataError) as raised:
            build_train_dataset(config, VOCAB, DomainWeights.from_config(config))
        assert "short.bin holds 5 tokens" in str(raised.value)
        assert "none.bin" in str(raised.value) and "tokenize" in str(raised.value)
        assert list(build_valid_datasets(config, VOCAB)) == ["a", "b", "c"]
        Path(f"{good}.bin").write_bytes(b"")
        with pytest.raises(DataError, match=r"domain a: .*good\.bin holds no tokens"):
            build_valid_datasets(config, VOCAB)


def test_validation_reads_the_same_sequences_whatever_the_seed(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "v", random_documents(3000, VOCAB), VOCAB)
    domains = (Domain("a", prefix, prefix, 0.5), Domain("b", prefix, prefix, 0.5))

    def first_sequences(seed: int) -> list[list[int]]:
        config = DataConfig(seq_length=16, domains=domains, seed=seed)
        datasets = build_valid_datasets(config, VOCAB)
        assert [dataset.dataset_id for dataset in datasets.values()] == [0, 1]
        return [datasets["b"][k].tolist() for k in range(10)]

    assert first_sequences(1) == first_sequences(2)


class TestBlend:
    @pytest.mark.parametrize(
        "weights",
        [
            (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15),
            (0.25, 0.25, 0.25, 0.25),
            (1.0,),
            (1 / 3, 1 / 3, 1 / 3),
            (0.1,) * 7 + (0.3,),  # sums to 0.9999999999999999
            (0.7, 0.3009),  # as far from 1 as a configuration may be
            (1e-5, 1 - 2e-5, 1e-5),
        ],
    )
    def test_one_segment_is_megatrons_blended_dataset(
        self, tmp_path: Path, weights: Weights
    ) -> None:
        size = 9000  # past the first block, so that growing is seen too
        blend = blend_of(tmp_path, weights, sizes=[3 * size] * 8, seq_length=2)
        epochs = [member._epoch(0) for member in blend.members]
        megatron = BlendedDataset(epochs, list(weights), size, epochs[0].config)
        located = [blend.locate(n) for n in range(size)]
        assert [domain for domain, _ in located] == megatron.dataset_index.tolist()
        assert [k for _, k in located] == megatron.dataset_sample_index.tolist()
        for n in range(0, size, 613):
            (number, text), theirs = blend[n], megatron[n]
            assert number == int(theirs["dataset_id"])
            assert text[:-1].tolist() == theirs["tokens"].tolist()

    def test_every_segment_is_greedy_and_goes_on_where_the_domains_were(
        self, tmp_path: Path
    ) -> None:
        blend = blend_of(tmp_path, (0.5, 0.3, 0.2))
        segments = [(0, (0.5, 0.3, 0.2)), (333, (0.1, 0.8, 0.1)), (333, (0.2, 0.2, 0.6))]
        segments += [(5000, (0.9, 0.05, 0.05))]
        set_segments(blend, *segments)
        given_so_far: Counter[int] = Counter()
        ends = [first for first, _ in segments[1:]] + [6000]
        for (first, weights), end in zip(segments, ends, strict=True):
            here = [0, 0, 0]
            for n in range(first, end):
                # the rule in words: whoever is furthest behind its share, the first on a tie
                behind = [w * max(n - first, 1) - c for w, c in zip(weights, here, strict=True)]
                domain = behind.index(max(behind))
                assert blend.locate(n) == (domain, given_so_far[domain])
                here[domain] += 1
                given_so_far[domain] += 1

    def test_an_update_leaves_what_was_before_it_and_any_order_of_asking_agrees(
        self, tmp_path: Path
    ) -> None:
        blend = blend_of(tmp_path, (0.5, 0.3, 0.2))
        before = [blend.locate(n) for n in range(1000)]
        set_segments(blend, (0, (0.5, 0.3, 0.2)), (700, (0.1, 0.1, 0.8)))
        after = [blend.locate(n) for n in range(2000)]
        assert after[:700] == before[:700] and after[700:1000] != before[700:]
        fresh = DynamicBlendedDataset(blend.members, blend.domain_weights)
        for n in np.random.default_rng(0).permutation(2000).tolist():
            assert fresh.locate(n) == after[n]

    def test_a_blend_goes_on_where_another_one_stopped(self, tmp_path: Path) -> None:
        blend = blend_of(tmp_path, (0.5, 0.3, 0.2))
        set_segments(blend, (0, (0.5, 0.3, 0.2)), (700, (0.1, 0.1, 0.8)))
        drawn = [blend.locate(n) for n in range(1000)]
        next_samples = blend.next_samples(1000)
        counts = Counter(domain for domain, _ in drawn)
        assert list(next_samples.values()) == [counts[domain] for domain in range(3)]
        weights = DomainWeights(blend.domain_weights.names, (0.4, 0.4, 0.2), {})
        later = DynamicBlendedDataset(blend.members, weights, list(next_samples.values()))
        assert not set(drawn) & {later.locate(n) for n in range(1000)}
        assert sum(later.next_samples(1000).values()) == 2000

    def test_loading_other_segments_forgets_the_old_ones(self, tmp_path: Path) -> None:
        blend = blend_of(tmp_path, (0.5, 0.3, 0.2))
        set_segments(blend, (0, (0.5, 0.3, 0.2)), (100, (0.1, 0.1, 0.8)), (200, (0.3, 0.3, 0.4)))
        blend.locate(500)
        saved = DomainWeights(blend.domain_weights.names, (0.5, 0.3, 0.2), {}).state_dict()
        saved["segments"] += [[150, [0.6, 0.2, 0.2]]]
        blend.domain_weights.load_state_dict(saved)
        fresh = DynamicBlendedDataset(blend.members, blend.domain_weights)
        assert [blend.locate(n) for n in range(600)] == [fresh.locate(n) for n in range(600)]

    def test_a_domain_of_weight_zero_gives_nothing(self, tmp_path: Path) -> None:
        blend = blend_of(tmp_path, (0.0, 0.5, 0.5))
        assert {blend.locate(n)[0] for n in range(1000)} == {1, 2}

    @settings(max_examples=25, deadline=None)
    @given(shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=5), n=st.integers(1, 9000))
    def test_a_longer_order_begins_with_the_shorter(self, shares: list[float], n: int) -> None:
        weights = tuple(np.array(shares) / np.sum(shares))
        short, long = Blend(weights), Blend(weights)
        long.counts(20_000)
        assert np.array_equal(short.counts(n), long.counts(n))
        assert short.locate(n - 1) == long.locate(n - 1)
        assert abs(short.counts(n) - n * np.array(weights)).max() < len(weights)

    def test_each_new_epoch_of_a_domain_is_logged_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        blend = blend_of(tmp_path, (0.5, 0.5), sizes=[161, 30_000])  # 10 samples an epoch
        with caplog.at_level(logging.INFO, logger="megashear"):
            for n in range(45):
                blend.locate(n)
        assert [record.getMessage() for record in caplog.records] == [
            "domain d0 begins epoch 2 at sample 20, in a new order",
            "domain d0 begins epoch 3 at sample 40, in a new order",
        ]
        assert blend[20][0] == 0 and blend[20][1].shape == (17,)

    def test_a_repeated_domain_repeats_no_sample_within_an_epoch(self, tmp_path: Path) -> None:
        prefix = write_tokens(tmp_path / "small", counting_documents(323), VOCAB)
        other = write_tokens(tmp_path / "large", random_documents(9000, VOCAB), VOCAB)
        members = [
            open_domain(prefix, name="small", dataset_id=0),
            open_domain(other, name="large", dataset_id=1),
        ]
        blend = DynamicBlendedDataset(members, DomainWeights(["small", "large"], (0.4, 0.6), {}))
        set_segments(blend, (0, (0.4, 0.6)), (77, (0.8, 0.2)), (130, (0.3, 0.7)))
        drawn = [blend[n] for n in range(300)]
        small = [text[:-1].tolist() for number, text in drawn if number == 0]
        for first in range(0, len(small) - 19, 20):
            epoch = [token for sample in small[first : first + 20] for token in sample]
            assert len(epoch) == len(set(epoch)) == 320


def test_domains_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    def made_by(name: str, sha256: str | None) -> str:
        documents = random_documents(400, VOCAB)
        prefix = write_tokens(tmp_path / name, documents, VOCAB)
        if sha256 is not None:
            known = {"vocab_size": VOCAB, "bos_id": 1, "eos_id": 2, "tokens": 400}
            text = json.dumps({"tokenizer_sha256": sha256, "documents": len(documents), **known})
            Path(f"{prefix}.json").write_text(text)
        return prefix

    one, same, unknown = made_by("a", "1" * 64), made_by("b", "1" * 64), made_by("c", None)
    other = made_by("d", "2" * 64)
    data = DataConfig(
        seq_length=16, domains=(Domain("x", one, same, 0.5), Domain("y", unknown, one, 0.5))
    )
    build_train_dataset(data, VOCAB, DomainWeights.from_config(data))
    mixed = DataConfig(
        seq_length=16, domains=(Domain("x", one, same, 0.5), Domain("y", other, one, 0.5))
    )
    with pytest.raises(DataError, match="different tokenizers") as raised:
        build_train_dataset(mixed, VOCAB, DomainWeights.from_config(mixed))
    assert f"222222222222: {other}" in str(raised.value)
