"""Speed of `megashear tokenize` beside the bare tokenizer library and Megatron-LM's way.

Three ways to do the same text with the same number of threads or processes, in turn, each in a new
process:

- library: sentencepiece or tokenizers encode texts that are in memory already; nothing is written;
- megashear: `tokenize_files`, from JSONL to files in their place, with the start of its processes;
- Megatron-LM: a process for each file decodes and encodes line by line and adds each document to
  an IndexedDatasetBuilder; imports, which take seconds, are left out.

Ratios of wall time say something on an idle machine only, those of CPU time on a busy one too. The
text is Python's standard library unless --input names other.

Example (four minutes on two idle cores):
  python benchmarks/tokenization.py
  python benchmarks/tokenization.py --input 'text/*.jsonl' --sentencepiece llama/tokenizer.model
"""

# Not named tokenize.py: the folder of a script comes before the standard library's `tokenize`.
from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import sentencepiece
import tokenizers
from harness import Ratio, Report, interleaved, parser, ratio

from megashear.console import run
from megashear.data.tokenize.jsonl import find_inputs, read_chunks, text_of
from megashear.data.tokenize.preprocess import tokenize_files
from megashear.tokenizer.load import Tokenizer, load_tokenizer

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


def train_sentencepiece(texts: list[str], folder: Path) -> Path:
    """A BPE with bytes to fall back to like LLaMA's, of a part of the texts; its model."""
    lines = (line for text in texts[:400] for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=8000,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def standard_library(size: float) -> list[str]:
    """Python's own modules in the order of their names, MB of them."""
    texts, left = [], size * 1e6
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if left > 0 and "site-packages" not in file.parts:
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
            left -= len(texts[-1])
    return [text for text in texts if text.strip()]


Row = tuple[str, int, str, float, float, Ratio, Ratio]


def compare(tokenizer: Path, files: Sequence[Path], rounds: int) -> list[Row]:
    """A row for each way: medians, and ratios to the library in the same round."""
    os.environ["RAYON_NUM_THREADS"] = str(len(files))  # threads of `tokenizers`
    cpu: dict[str, list[float]] = {name: [] for name in WAYS}

    def case(name: str) -> float:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            seconds, of_cpu = alone.submit(WAYS[name], tokenizer, files).result()
        cpu[name].append(of_cpu)
        return seconds

    wall = interleaved({name: partial(case, name) for name in WAYS}, rounds, warm_up=0)
    return [
        (
            tokenizer.name,
            len(files),
            name,
            *(round(median(found[name]), 1) for found in (wall, cpu)),
            *(ratio(found[name], found["library"]) for found in (wall, cpu)),
        )
        for name in WAYS
    ]


def main() -> None:
    """Measure, print and keep the table."""
    options = parser(__doc__, rounds=3)
    option = options.add_argument
    option("--input", nargs="+", metavar="FILE", help="JSONL, its field `text`")
    option("--mb", type=float, default=8, help="of the standard library without it (default: 8)")
    option("--sentencepiece", type=Path, metavar="MODEL", help="default: trained on the text")
    option("--workers", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    arguments = options.parse_args()
    given = arguments.input and read_texts(find_inputs(arguments.input))
    texts = given or standard_library(arguments.mb)
    rows = []
    report = Report("tokenization", __doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = arguments.sentencepiece or train_sentencepiece(texts, folder)
        for tokenizer in (model, train_byte_level(texts, folder)):
            for workers in arguments.workers:
                files = [folder / f"{number}.jsonl" for number in range(workers)]
                for number, file in enumerate(files):
                    lines = (json.dumps({"text": text}) for text in texts[number::workers])
                    file.write_text("\n".join(lines), encoding="utf-8")
                rows += compare(tokenizer, files, arguments.rounds)
    size = sum(len(text.encode()) for text in texts)
    header = ["tokenizer", "workers", "way", "seconds", "CPU s", "over library", "its CPU"]
    report.table(f"{len(texts):,} texts, {size / 1e6:.1f} MB", header, rows)
    report.note(f"sentencepiece {sentencepiece.__version__}, tokenizers {tokenizers.__version__}")
    report.write(arguments.out)


if __name__ == "__main__":
    run(main)
