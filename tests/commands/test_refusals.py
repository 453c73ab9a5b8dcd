"""A command that refuses its arguments has imported neither torch nor Megatron."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.make_tokenizer import REPOSITORY

REFUSED = (
    "plan absent.yaml",
    "plan --source absent --size 1B",
    "plan --source absent --size many",
    "shear absent.yaml",
    "shear run.yaml",
    "tokenize --input absent --tokenizer absent --output out",
    "import --hf absent --out out",
    "import --hf meta-llama/Llama-2-7b --out out",
    "import --hf folder --out out",
    "train absent.yaml",
    "train --config absent.yaml",
    "train",
    "launch absent.py run.yaml",
    "watch absent --once",
    "extract --run absent",
    "extract --run folder",
    "export --checkpoint absent --out out",
    "verify absent folder",
    "inspect absent",
    "inspect folder",
    "evaluate absent",
    "reference-loss source absent --out out.yaml",
    "reference-loss scaling absent.yaml --domains absent.yaml --out out.yaml",
    "report absent",
    "report folder --otu page.html",
    "inspct folder",
)
EACH = """
import contextlib, json, os, sys
from megashear import cli, console
found = {}
for words in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if os.fork() == 0:
        with open(os.devnull, "w") as sys.stderr, contextlib.suppress(BaseException):
            try:
                console.run(lambda: cli.execute(words.split()))
            except SystemExit as end:
                heavy = [name for name in ("torch", "megatron") if name in sys.modules]
                os.write(write, json.dumps([end.code, heavy]).encode())
        os._exit(0)
    os.close(write)
    found[words] = json.loads(os.read(read, 1000) or "null")
    os.wait()
print(json.dumps(found))
"""


def test_a_refused_command_has_not_imported_torch(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "run.yaml").write_text("stage: prune\nrun_dir: run\n")
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(REFUSED)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout) == {words: [2, []] for words in REFUSED}


def test_a_hub_name_gets_the_command_that_fetches_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megashear", "inspect", "meta-llama/Llama-2-7b"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "hf download meta-llama/Llama-2-7b --local-dir models/Llama-2-7b" in done.stderr
