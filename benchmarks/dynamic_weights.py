"""Does dynamic batch loading do what it is for? Rule paper against constant weights, on the demo.

    make demo ARGS="--out demo-run"        # or some other folder: source model, domains, tokens
    python benchmarks/dynamic_weights.py demo-run

Prunes the demo's source model and trains the result on, once by each rule and seed, with the same
tokens and equal weights at the start. References are the source model's losses. What is done is not
done again, so the command can be interrupted. The table: over the domains, the spread (standard
deviation) and the mean of loss - reference, on all validation text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, pstdev, stdev

from megashear.console import run, table

ROOT = Path(__file__).resolve().parent.parent
DOMAINS = ("prose", "python", "cpp", "stubs", "data")
SEQ_LENGTH = 256
ALL = 100_000  # sequences of validation text: more than any domain has

Losses = dict[str, float]
Results = dict[tuple[str, int], tuple[Losses, Losses]]
"""By rule and seed: losses after pruning, and at the end."""


def main() -> None:
    """Measure the source, run every rule and seed, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("demo", type=Path, help="folder of a finished demo")
    option("--source", default="source", help="run in that folder to prune (default: source)")
    option("--out", default="dynamic-weights", help="folder of the runs, in that folder")
    option("--rules", nargs="+", default=["constant", "paper"], metavar="RULE")
    option("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    option("--continue-steps", type=int, default=160, metavar="N", help="default: 160")
    option("--interval", type=int, default=20, help="steps between evaluations (default: 20)")
    option("--sequences", type=int, default=16, help="of a domain in each (default: 16)")
    option("--set", nargs="+", default=[], metavar="key.sub=value", help="options of every run")
    option("--jobs", type=int, default=2, help="runs at a time, one process each (default: 2)")
    experiment = Experiment(parser.parse_args())
    experiment.run()


class Experiment:
    """All runs of one setting, below one folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.demo: Path = arguments.demo.resolve()
        self.folder = self.demo / arguments.out
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Every rule and seed, `jobs` at a time."""
        source = self.demo / self.arguments.source
        steering = self.losses(source, "source-some", self.arguments.sequences)
        references = self.losses(source, "source-all", ALL)
        pairs = [(rule, seed) for seed in self.arguments.seeds for rule in self.arguments.rules]
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            done = pool.map(lambda pair: self.prune_and_continue(pair[0], pair[1], steering), pairs)
            results = dict(zip(pairs, done, strict=True))
        print(report(references, results))

    def prune_and_continue(self, rule: str, seed: int, references: Losses) -> tuple[Losses, Losses]:
        """Losses of the model after pruning and after training on."""
        name = f"{rule}-{seed}"
        prune, trained = self.folder / f"{name}-prune", self.folder / f"{name}-continue"
        extracted = prune / "extracted"
        common = (f"data.rule={rule}", f"data.seed={seed}", f"trainer.seed={seed}")
        common += (f"evaluation.interval={self.arguments.interval}",)
        common += (f"evaluation.sequences_per_domain={self.arguments.sequences}",)
        if not extracted.exists():
            source = f"init_from={self.arguments.source}"
            self.train("prune", prune, *common, source, *domains(references))
            self.call(prune, ROOT / "tools/checkpoint/extract.py", "--run", prune)
        pruned = self.losses(extracted, f"{name}-pruned", ALL)
        if not (self.folder / f"{name}-continued.json").exists():
            after = (f"init_from={extracted}", f"data.domains_from={prune}")
            steps = f"trainer.steps={self.arguments.continue_steps}"
            self.train("continue", trained, *common, *after, steps)
        return pruned, self.losses(trained, f"{name}-continued", ALL)

    def train(self, stage: str, run_dir: Path, *overrides: str) -> None:
        """One run of a stage of the demo on one process; it goes on where it was."""
        script = ROOT / "examples/pretrain_shear.py"
        config = ROOT / f"examples/demo/{stage}.yaml"
        fixed = (f"run_dir={run_dir}", "parallel.tensor=1", "trainer.save_interval=1000")
        changed = (*fixed, *overrides, *self.arguments.set)
        self.call(run_dir, script, "--config", config, *changed)

    def losses(self, model: Path, name: str, sequences: int) -> Losses:
        """A model's loss on every domain (nats per token)."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            text = ("--domains", "source/domains.yaml", "--seq-length", str(SEQ_LENGTH))
            text += ("--sequences", str(sequences), "--device", "cpu", "--json", file)
            self.call(file.with_suffix(""), "-m", "megashear", "evaluate", model, *text)
        (measured,) = json.loads(file.read_text())["models"]
        losses: Losses = measured["losses"]
        return losses

    def call(self, name: Path, *command: str | Path) -> None:
        """A command in the demo's folder, its output added to NAME.log."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with name.with_suffix(".log").open("a") as log:
            subprocess.run(
                [sys.executable, *map(str, command)],
                cwd=self.demo, env=environment, stdout=log, stderr=log, check=True,
            )  # fmt: skip


def domains(references: Losses) -> tuple[str, str]:
    """The demo's domains with equal weights and these references, as overrides."""
    records = [
        {
            "name": name,
            "train": f"data/{name}_train",
            "valid": f"data/{name}_valid",
            "weight": 1 / len(DOMAINS),
            "reference_loss": references[name],
        }
        for name in DOMAINS
    ]
    return "data.domains_from=null", f"data.domains={json.dumps(records)}"


def report(references: Losses, results: Results) -> str:
    """What came out: by run, by rule against the first one, and by domain."""
    header = ("spread, pruned", "mean gap, pruned", "spread, end", "mean gap, end", "loss, end")
    found = {pair: figures(references, *losses) for pair, losses in results.items()}
    rules, seeds = (list(dict.fromkeys(column)) for column in zip(*found, strict=True))
    rows = [(*pair, *(f"{value:.4f}" for value in values)) for pair, values in found.items()]
    parts = [table(rows, ("rule", "seed", *header))]

    rows = [(rule, *summary([found[rule, seed] for seed in seeds], ".4f")) for rule in rules]
    for rule in rules[1:]:
        pairs = [(found[rule, seed], found[rules[0], seed]) for seed in seeds]
        differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
        rows.append((f"{rule} - {rules[0]}", *summary(differences, "+.4f")))
    parts.append("mean over seeds, +- standard deviation\n" + table(rows, ("rule", *header)))

    rows = []
    for rule in rules:
        for stage, when in enumerate(("pruned", "end")):
            losses = [results[rule, seed][stage] for seed in seeds]
            gaps = [mean(each[name] - references[name] for each in losses) for name in DOMAINS]
            rows.append((rule, when, *(f"{gap:+.3f}" for gap in gaps)))
    parts.append("loss - reference, mean over seeds\n" + table(rows, ("rule", "model", *DOMAINS)))
    return "\n\n".join(parts)


def summary(runs: Sequence[Sequence[float]], form: str) -> list[str]:
    """Mean of every figure over runs, and its standard deviation where there are several."""
    texts = []
    for values in zip(*runs, strict=True):
        spread = f" +- {stdev(values):.4f}" if len(values) > 1 else ""
        texts.append(f"{mean(values):{form}}{spread}")
    return texts


def figures(references: Losses, pruned: Losses, end: Losses) -> list[float]:
    """Spread and mean of the gaps after pruning and at the end, and the mean loss at the end."""
    found: list[float] = []
    for losses in (pruned, end):
        gaps = [losses[name] - references[name] for name in DOMAINS]
        found += [pstdev(gaps), mean(gaps)]
    return [*found, mean(end.values())]


if __name__ == "__main__":
    run(main)
