"""The `megashear` command as its user meets it: output, messages, exit statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from megashear import cli
from megashear.data.tokenize.preprocess import tokenize_files
from tests.support.make_tokenizer import REPOSITORY, make_tokenizer, real_texts, write_jsonl


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megashear", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_tokenize_prints_what_it_wrote(tokenizer: Path, tmp_path: Path) -> None:
    texts = real_texts()
    source = write_jsonl(tmp_path / "in" / "a.jsonl", [*texts, ""])
    prefix = tmp_path / "out" / "x"
    arguments = ["--input", f"{tmp_path}/in/*.jsonl", "--tokenizer", tokenizer, "--output", prefix]
    done = run("tokenize", *arguments, "--valid-fraction", 0.2)
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows, skipped = done.stdout.splitlines()
    assert header.split() == ["output", "documents", "tokens", "tokens/s"]
    assert skipped == "skipped 1 empty documents"
    library = tokenize_files([str(source)], tokenizer, tmp_path / "y", valid_fraction=0.2)
    for row, output in zip(rows, library.outputs.values(), strict=True):
        shown = row.split()[1:3]
        assert shown == [f"{output.documents:,}", f"{output.tokens:,}"]
    for part in ("_train.bin", "_train.idx", "_valid.bin", "_valid.idx"):
        assert Path(f"{prefix}{part}").read_bytes() == (tmp_path / f"y{part}").read_bytes()


def test_every_file_is_a_domain_where_the_output_says_name(tokenizer: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [name + text for text in real_texts()])
    arguments = ["--input", f"{tmp_path}/in/*.jsonl", "--tokenizer", tokenizer]
    done = run("tokenize", *arguments, "--output", f"{tmp_path}/out/{{name}}")
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("a", "b"):
        tokenize_files([f"{tmp_path}/in/{name}.jsonl"], tokenizer, tmp_path / name)
        expected = (tmp_path / f"{name}.bin").read_bytes()
        assert (tmp_path / "out" / f"{name}.bin").read_bytes() == expected


def test_domains_by_name_are_kept_apart(tokenizer: Path, tmp_path: Path) -> None:
    """Files that would share a name are refused; a bad one does not keep the others out."""
    texts = real_texts()
    for name in ("wiki.en.jsonl", "wiki.de.jsonl", "cc.jsonl"):
        write_jsonl(tmp_path / name, texts)
    packed = zstandard.compress((tmp_path / "cc.jsonl").read_bytes())
    (tmp_path / "c4.jsonl.zst").write_bytes(packed)
    (tmp_path / "bad.jsonl").write_text('{"text"\n')
    arguments = ["--input", f"{tmp_path}/*.jsonl*", "--tokenizer", tokenizer]
    done = run("tokenize", *arguments, "--output", f"{tmp_path}/out/{{name}}")
    assert done.returncode == 2
    assert f"{tmp_path}/bad.jsonl:1: not JSON" in done.stderr
    made = sorted(file.name for file in (tmp_path / "out").glob("*.bin"))
    assert made == ["c4.bin", "cc.bin", "wiki.de.bin", "wiki.en.bin"]
    assert all(name.removesuffix(".bin") in done.stdout for name in made)

    again = ["--input", f"{tmp_path}/c*.jsonl*", *arguments[2:]]
    done = run("tokenize", *again, "--output", f"{tmp_path}/out/{{name}}")
    assert (done.returncode, done.stdout.count("there already")) == (0, 2)

    write_jsonl(tmp_path / "more" / "cc.jsonl", texts)
    both = ["--input", f"{tmp_path}/cc.jsonl", f"{tmp_path}/more/cc.jsonl", *arguments[2:]]
    done = run("tokenize", *both, "--output", f"{tmp_path}/other/{{name}}")
    assert done.returncode == 2
    assert f"other/cc: {tmp_path}/cc.jsonl, {tmp_path}/more/cc.jsonl" in done.stderr
    done = run("tokenize", *both, "--output", f"{tmp_path}/other/{{domain}}")
    assert (done.returncode, (tmp_path / "other").exists()) == (2, False)


def test_errors_are_one_message_and_status_2(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n{"text"\n')
    done = run("tokenize", "--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "x")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: 1 malformed line")
    assert f"{source}:2: not JSON" in done.stderr and "Traceback" not in done.stderr


def test_help_shows_an_example_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.execute(["tokenize", "--help"])
    assert left.value.code == 0
    example = capsys.readouterr().out.split("  megashear ")[1]
    words = example.split("\n\n")[0].replace("\\\n", " ").replace("'", "").split()
    parsed = cli._parser().parse_args(words)
    assert (parsed.output, parsed.valid_fraction) == ("data/{name}", 0.05)


def test_wrong_use_is_status_2() -> None:
    for arguments in (["tokenise"], ["tokenize", "--input", "x"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert "usage: megashear" in done.stderr and "Traceback" not in done.stderr


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, megashear.cli as c\n"
        "try: c.execute(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr
