"""Speed of `megashear tokenize` beside the bare tokenizer library and Megatron-LM's way.

Three ways to do the same text with the same number of threads or processes, in turn, each in a new
process:

- library: sentencepiece or tokenizers encode texts that are in memory already; nothing is written;
- megashear: `tokenize_files`, from JSONL to files in their place, with the start of its processes;
- Megatron-LM: a process for each file decodes and encodes line by line and adds each document to
  an IndexedDatasetBuilder; imports, which take seconds, are left out.

Ratios of wall time say something on an idle machine only, those of CPU time on a busy one too.

    python benchmarks/tokenization.py --input 'text/*.jsonl' --sentencepiece llama/tokenizer.model
"""

# Not named tokenize.py: the folder of a script comes before the standard library's `tokenize`.
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import sentencepiece
import tokenizers

from megashear import console
from megashear.data.jsonl import find_inputs, read_chunks, text_of
from megashear.data.preprocess import tokenize_files
from megashear.data.tokenizer import Tokenizer, load_tokenizer

PIECES = 32_000  # of the byte-level BPE that stands for Hugging Face's tokenizers


def library(tokenizer: Path, files: Sequence[Path]) -> tuple[float, float]:
    """The bare library, by threads of its own."""
    texts = read_texts(files)
    if tokenizer.suffix == ".json":
        fast = tokenizers.Tokenizer.from_file(str(tokenizer))
        return measure(partial(fast.encode_batch_fast, texts, add_special_tokens=False))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return measure(partial(processor.encode, texts, num_threads=len(files)))


def megashear(tokenizer: Path, files: Sequence[Path]) -> tuple[float, float]:
    """What `megashear tokenize` does."""
    with tempfile.TemporaryDirectory(dir=files[0].parent) as out:
        names, workers = list(map(str, files)), len(files)
        return measure(partial(tokenize_files, names, tokenizer, f"{out}/x", workers=workers))


def megatron(tokenizer: Path, files: Sequence[Path]) -> tuple[float, float]:
    """What Megatron-LM's tools/preprocess_data.py does with a process for each file."""
    from megatron.core.datasets import indexed_dataset  # here, so that the processes have it

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    known, dtype = load_tokenizer(tokenizer), indexed_dataset.DType
    context = multiprocessing.get_context("fork")

    def convert(file: Path) -> None:
        builder = indexed_dataset.IndexedDatasetBuilder(
            f"{file}.bin", dtype=dtype.optimal_dtype(known.vocab_size)
        )
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                add_document(builder.add_document, known, json.loads(line)["text"])
        builder.finalize(f"{file}.idx")

    def convert_all() -> None:
        processes = [context.Process(target=convert, args=(file,)) for file in files]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

    return measure(convert_all)


def add_document(add: Callable[[list[int], list[int]], None], known: Tokenizer, text: str) -> None:
    """Encode one text and add it, as Megatron-LM's Encoder does."""
    bos = [] if known.bos_id is None else [known.bos_id]
    ids = [*bos, *known.encode([text])[0], known.eos_id]
    add(ids, [len(ids)])


WAYS = {"library": library, "megashear": megashear, "Megatron-LM": megatron}


def measure(way: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call and of the processes that it started and waited for."""

    def cpu() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before, started = cpu(), time.perf_counter()
    way()
    return time.perf_counter() - started, cpu() - before


def read_texts(files: Sequence[Path]) -> list[str]:
    """All texts that are not empty."""
    lines = (line for chunk in read_chunks(files) for line in chunk.lines if line.strip())
    return [text for text in (text_of(line, "text") for line in lines) if text.strip()]


def train_byte_level(texts: list[str], folder: Path) -> Path:
    """A byte-level BPE like Llama 3's, of the texts themselves; its tokenizer.json."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=["<|end|>"], show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return folder / "tokenizer.json"


def compare(tokenizer: Path, files: Sequence[Path], repeats: int) -> list[tuple[object, ...]]:
    """A row for each way: medians, and of ratios to the library in the same round."""
    os.environ["RAYON_NUM_THREADS"] = str(len(files))  # threads of `tokenizers`
    rounds = []
    for _ in range(repeats):
        times = {}
        for name, way in WAYS.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                times[name] = alone.submit(way, tokenizer, files).result()
        rounds.append(times)
    rows: list[tuple[object, ...]] = []
    for name in WAYS:
        wall, cpu = (median(times[name][i] for times in rounds) for i in (0, 1))
        ratios = [median(t[name][i] / t["library"][i] for t in rounds) for i in (0, 1)]
        row = (tokenizer.name, len(files), name, f"{wall:.1f}", f"{cpu:.1f}")
        rows.append((*row, *(f"{ratio:.2f}" for ratio in ratios)))
    return rows


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--input", nargs="+", required=True, metavar="FILE", help="JSONL, its field `text`")
    option("--sentencepiece", type=Path, required=True, metavar="MODEL")
    option("--workers", type=int, nargs="+", default=[1, 2])
    option("--copies", type=int, default=1, help="of the text, one after the other (default: 1)")
    option("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    texts = read_texts(find_inputs(arguments.input)) * arguments.copies
    size = sum(len(text.encode()) for text in texts)
    print("$ python", shlex.join(sys.argv))
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(
        f"{len(texts):,} texts, {size / 1e6:.1f} MB; {os.cpu_count()} cores, load {load};", end=" "
    )
    print(
        f"Python {platform.python_version()}, sentencepiece {sentencepiece.__version__},", end=" "
    )
    print(f"tokenizers {tokenizers.__version__}")
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tokenizer in (arguments.sentencepiece, train_byte_level(texts, folder)):
            for workers in arguments.workers:
                files = [folder / f"{number}.jsonl" for number in range(workers)]
                for number, file in enumerate(files):
                    lines = (json.dumps({"text": text}) for text in texts[number::workers])
                    file.write_text("\n".join(lines), encoding="utf-8")
                rows += compare(tokenizer, files, arguments.repeats)
    header = ("tokenizer", "workers", "way", "seconds", "CPU s", "of library", "of its CPU")
    print(console.table(rows, header))


if __name__ == "__main__":
    main()
