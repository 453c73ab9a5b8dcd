"""Samples as functions of their number: of one domain, and of the blend of all domains.

Megatron-Core's IndexedDataset, GPTDataset and blending rule do the work; this module makes them
endless and re-weightable. It needs no process group, and imports nothing from model or training.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.utils.data import Dataset

from megashear.config.schema import DataConfig
from megashear.data.blend import Blend
from megashear.data.domain_weights import DomainWeights, Segment
from megashear.data.fingerprint import Fingerprint, check_fingerprint, check_one_tokenizer
from megashear.data.index_cache import CACHED_FROM, EpochDataset
from megashear.errors import DataError

log = logging.getLogger("megashear")

VALIDATION_SEED = 0
"""Fixed, so that runs of any seed and the source model are measured on the same sequences."""


class DomainDataset(Dataset[np.ndarray]):
    """The endless sequence of samples of one domain: epoch after epoch, each shuffled anew.

    Sample k is a function of the file, the seed and k: sample k % samples_per_epoch of an
    EpochDataset that is built when its epoch is first needed. Documents continue across sample
    boundaries.

    Args:
        name: name of the domain; the shuffles depend on it and on `seed`, any integer.
        prefix: path of the token file without .bin/.idx.
        seq_length: tokens of a sample (one more is read, for the last label).
        vocab_size: size of the vocabulary; all ids in the file must be below it.
        dataset_id: number of the domain in its blend.
        index_cache: directory of epoch indices; by default `index_cache` next to the file.
        eos: id of the token that ends a document; None lets attention cross documents.

    Raises:
        DataError: the files are missing or damaged, or too short for one sample.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        *,
        seq_length: int,
        vocab_size: int,
        seed: int,
        dataset_id: int,
        index_cache: str | None = None,
        eos: int | None = None,
    ) -> None:
        self.name, self.prefix, self.dataset_id, self.eos = name, prefix, dataset_id, eos
        self.seq_length, self.vocab_size, self.seed = seq_length, vocab_size, seed
        self._file = _open_tokens(prefix)
        tokens = int(self._file.sequence_lengths.sum(dtype=np.int64))
        check_fingerprint(prefix, len(self._file), tokens, vocab_size)
        # GPTDataset's own count: the last, partial sequence of an epoch is dropped.
        self.samples_per_epoch = (tokens - 1) // seq_length
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{prefix}.bin holds {tokens} tokens, fewer than the {seq_length + 1} of one "
                f"sample: give domain {name} more text, or lower data.seq_length"
            )
        kept = len(self._file) + self.samples_per_epoch >= CACHED_FROM
        directory = Path(index_cache) if index_cache else Path(prefix).parent / "index_cache"
        self._cache = directory if kept else None
        self._epochs: dict[int, EpochDataset] = {}

    def __getitem__(self, k: int) -> np.ndarray:
        """Return the tokens [seq_length + 1] of sample k, int32.

        Raises:
            DataError: the file holds a token id that the vocabulary does not have.
        """
        epoch, number = divmod(k, self.samples_per_epoch)
        query = self._epoch(epoch)._query_document_sample_shuffle_indices
        tokens: np.ndarray = query(number)[0]
        outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)]
        if outside.size:
            raise DataError(
                f"{self.prefix}.bin holds token id {outside[0]}, but the vocabulary ends at "
                f"{self.vocab_size - 1}: tokenize domain {self.name} with the model's tokenizer"
            )
        return tokens.astype(np.int32)

    def _epoch(self, epoch: int) -> EpochDataset:
        """Return the index of an epoch; the previous one is kept for samples still in flight."""
        if epoch not in self._epochs:
            key = hashlib.sha256(f"{self.seed}/{self.name}/{epoch}".encode()).digest()
            seed = int.from_bytes(key[:4], "little")
            built = EpochDataset(self._file, self.seq_length, seed, self._cache)
            assert len(built) == self.samples_per_epoch
            before = {e: index for e, index in self._epochs.items() if e == epoch - 1}
            self._epochs = {**before, epoch: built}
        return self._epochs[epoch]


class DynamicBlendedDataset(Dataset[tuple[int, np.ndarray]]):
    """Map a global sample number to a sample of a domain, by the segments of the domain weights.

    It takes the place of Megatron's BlendedDataset. Within a segment domains alternate by the same
    greedy rule; in each segment a domain continues after the samples that it has given.

    Args:
        members: the domains, in the order of `domain_weights`, all of one tokenizer.
        domain_weights: may be updated at any time; samples of its newest segment follow it.
        first_samples: number of each domain's sample to start with; by default 0.
    """

    def __init__(
        self,
        members: Sequence[DomainDataset],
        domain_weights: DomainWeights,
        first_samples: Sequence[int] | None = None,
    ) -> None:
        assert [member.name for member in members] == list(domain_weights.names)
        assert [member.dataset_id for member in members] == list(range(len(members)))
        self.members, self.domain_weights = list(members), domain_weights
        self.eos = members[0].eos
        self._first = np.array(first_samples or [0] * len(members), dtype=np.int64)
        self._segments: tuple[Segment, ...] = ()  # the segments of _cursors
        self._cursors: list[np.ndarray] = []  # each domain's next sample where a segment starts
        self._blend = Blend(())  # blend of the segment that was used last
        self._epochs: dict[int, int] = {}

    def __getitem__(self, n: int) -> tuple[int, np.ndarray]:
        """Return (domain, tokens [seq_length + 1]) of global sample n."""
        domain, k = self.locate(n)
        return domain, self.members[domain][k]

    def locate(self, n: int) -> tuple[int, int]:
        """Return (domain, sample number in it) of global sample n, in constant time on average."""
        segment, cursor = self._segment_of(n)
        domain, k = self._blend_of(segment).locate(n - segment.first_sample)
        k += int(cursor[domain])
        self._note_epoch(domain, k // self.members[domain].samples_per_epoch, n)
        return domain, k

    def next_samples(self, n: int) -> dict[str, int]:
        """Return the number of each domain's next sample once n global samples are drawn."""
        segment, cursor = self._segment_of(n)
        counts = self._blend_of(segment).counts(n - segment.first_sample)
        return dict(zip(self.domain_weights.names, (cursor + counts).tolist(), strict=True))

    def _segment_of(self, n: int) -> tuple[Segment, np.ndarray]:
        """Return the segment of global sample n and its cursor."""
        self._follow_domain_weights()
        index = bisect_right(self._segments, n, key=lambda segment: segment.first_sample) - 1
        assert index >= 0, f"there is no sample {n}"
        return self._segments[index], self._cursors[index]

    def _follow_domain_weights(self) -> None:
        """Compute the cursors of new segments: an update costs one segment's length."""
        segments = self.domain_weights.segments
        if segments is self._segments:
            return
        if segments[: len(self._segments)] != self._segments:  # a checkpoint was loaded
            self._cursors = []
        for index in range(len(self._cursors), len(segments)):
            cursor = self._first
            if index > 0:
                before = segments[index - 1]
                length = segments[index].first_sample - before.first_sample
                cursor = self._cursors[index - 1] + self._blend_of(before).counts(length)
            self._cursors.append(cursor)
        self._segments = segments

    def _blend_of(self, segment: Segment) -> Blend:
        if self._blend.weights != segment.weights:
            self._blend = Blend(segment.weights)
        return self._blend

    def _note_epoch(self, domain: int, epoch: int, n: int) -> None:
        if epoch > self._epochs.setdefault(domain, epoch):
            name = self.members[domain].name
            log.info("domain %s begins epoch %d at sample %d, in a new order", name, epoch + 1, n)
            self._epochs[domain] = epoch


def build_train_dataset(
    config: DataConfig, vocab_size: int, domain_weights: DomainWeights
) -> DynamicBlendedDataset:
    """Open the training files of all domains as one blend.

    Raises:
        DataError: names every file that is missing, damaged or too short; or validation and
            training files were not all made by one tokenizer.
    """
    check_one_tokenizer([file for d in config.domains for file in (d.train, d.valid)])
    members = _open_all(config, "train", vocab_size, config.seed)
    first_samples = [domain.first_sample for domain in config.domains]
    return DynamicBlendedDataset(members, domain_weights, first_samples)


def build_valid_datasets(config: DataConfig, vocab_size: int) -> dict[str, DomainDataset]:
    """Open the validation files by domain; their order depends on the file and domain alone.

    Raises:
        DataError: names every file that is missing, damaged or too short.
    """
    members = _open_all(config, "valid", vocab_size, VALIDATION_SEED)
    return {member.name: member for member in members}


def _open_all(config: DataConfig, part: str, vocab_size: int, seed: int) -> list[DomainDataset]:
    """Open the `train` or `valid` files of all domains, numbered in their order."""
    members, problems = [], []
    for number, domain in enumerate(config.domains):
        prefix = getattr(domain, part)
        try:
            member = DomainDataset(
                domain.name,
                prefix,
                seq_length=config.seq_length,
                vocab_size=vocab_size,
                seed=seed,
                dataset_id=number,
                index_cache=config.index_cache,
                eos=_end_of_document(prefix) if config.reset_attention_mask else None,
            )
        except DataError as error:
            problems.append(f"domain {domain.name}: {error}")
        else:
            members.append(member)
    if problems:
        raise DataError("\n".join(problems))
    return members


def _end_of_document(prefix: str) -> int:
    try:
        return Fingerprint.read(prefix).eos_id
    except DataError as error:
        raise DataError(
            f"{error}, or set data.reset_attention_mask to false: it needs the id that ends a "
            "document (eos_id)"
        ) from error


def _open_tokens(prefix: str) -> IndexedDataset:
    """Open a token file, after checks that Megatron's reader asserts or omits."""
    missing = [path for path in (f"{prefix}.bin", f"{prefix}.idx") if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{' and '.join(missing)} not found: write token files with `megashear tokenize`, or "
            "correct the path in data.domains (without .bin or .idx)"
        )
    with open(f"{prefix}.idx", "rb") as file:
        header = file.read(34).ljust(34, b"\0")
    magic, version, dtype, sequences, documents = struct.unpack("<9sQBQQ", header)
    size = 34 + 12 * sequences + 8 * documents
    known = magic == b"MMIDIDX\0\0" and version == 1 and 1 <= dtype <= 8
    if not known or os.path.getsize(f"{prefix}.idx") != size:
        raise DataError(f"{prefix}.idx is not a complete Megatron token index: tokenize it again")
    if sequences == 0 or os.path.getsize(f"{prefix}.bin") == 0:
        raise DataError(f"{prefix}.bin holds no tokens: the domain needs text")
    tokens = IndexedDataset(prefix)
    found = os.path.getsize(f"{prefix}.bin")
    expected = int(tokens.sequence_lengths.sum(dtype=np.int64))
    expected *= np.dtype(tokens.index.dtype).itemsize
    if found != expected:
        raise DataError(
            f"{prefix}.bin is {found} bytes long, but {prefix}.idx describes {expected}: the two "
            "are not from one run; tokenize again"
        )
    return tokens
